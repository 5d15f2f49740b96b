//! Every bound of the format, in one place. `repo-format.md` states them; a test compares the two.

/// The version that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u16 = 1;

/// Granularity of comparison and of cut points, bytes.
pub const BLOCK_LEN: u64 = 4096;

/// Longest chunk, bytes. A node is a chunk too.
pub const MAX_CHUNK_LEN: u32 = 1 << 20;

/// Longest plaintext of a frame with its length list, bytes.
pub const MAX_FRAME_RAW_LEN: u32 = 4 << 20;

/// Most chunks in one frame.
pub const MAX_FRAME_CHUNKS: u32 = 8192;

/// Longest pack file, bytes; a reader refuses more. A writer ends a pack near `pack_target_len` of the config.
pub const MAX_PACK_LEN: u64 = 128 << 20;

/// Longest plaintext of a pack's table, bytes.
pub const MAX_PACK_TABLE_LEN: u32 = 32 << 20;

/// Longest plaintext of an index segment's body, bytes.
pub const MAX_SEGMENT_LEN: u32 = 64 << 20;

/// Most chunk entries that a writer puts into one segment.
pub const SEGMENT_TARGET_CHUNKS: usize = 200_000;

/// Longest plaintext of config, session, mark, tombstone and damage record bodies, bytes.
pub const MAX_SMALL_OBJECT_LEN: u32 = 16 << 20;

/// Longest plaintext of an outcome's body, bytes: it holds the domain's XML twice.
pub const MAX_OUTCOME_LEN: u32 = 32 << 20;

/// Longest domain XML that is kept, bytes.
pub const MAX_XML_LEN: usize = 4 << 20;

/// Most disks, and most side files, of one point.
pub const MAX_DISKS: usize = 256;

/// Longest name of a domain, disk, tag or checkpoint, bytes.
pub const MAX_NAME_LEN: usize = 512;

/// Largest disk, bytes: 8 EiB less one block, so that positions fit a signed 64-bit number.
pub const MAX_DISK_LEN: u64 = i64::MAX as u64 - (BLOCK_LEN - 1);

/// Smallest and largest range of one manifest leaf, bytes.
pub const LEAF_LEN_RANGE: std::ops::RangeInclusive<u64> = 1 << 16..=1 << 26;

/// Smallest and largest number of children of an inner manifest node.
pub const FANOUT_RANGE: std::ops::RangeInclusive<u32> = 2..=1024;

/// Most entries in one manifest leaf.
pub const MAX_LEAF_ENTRIES: usize = 1 << 14;

/// Most levels of inner nodes above a leaf.
pub const MAX_TREE_HEIGHT: u8 = 48;

/// Smallest and largest plaintext after which a writer may end a frame, bytes. With one more chunk and the list
/// of lengths the largest is below [`MAX_FRAME_RAW_LEN`].
pub const FRAME_TARGET_RANGE: std::ops::RangeInclusive<u32> = 1 << 12..=1 << 21;

/// Smallest and largest length after which a writer may end a pack, bytes.
pub const PACK_TARGET_RANGE: std::ops::RangeInclusive<u64> = 1 << 16..=MAX_PACK_LEN / 2;

/// Smallest and largest zstd level.
pub const ZSTD_LEVEL_RANGE: std::ops::RangeInclusive<i32> = -7..=22;
