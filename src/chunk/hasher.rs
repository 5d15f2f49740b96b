//! The names of chunks.

use std::cell::RefCell;
use std::fmt;

use crate::format::node::ChunkKind;
use crate::id::ChunkId;

thread_local! {
    /// The last chunk that was named, behind the byte of its kind.
    static KIND_AND_PLAIN: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Makes chunk ids with the key of one key domain.
#[derive(Clone)]
pub struct IdHasher {
    keyed: blake3::Hasher,
}

impl IdHasher {
    /// Creates a hasher for a key domain's key.
    pub fn new(key: [u8; 32]) -> Self {
        Self { keyed: blake3::Hasher::new_keyed(&key) }
    }

    /// Returns the id of a chunk: keyed BLAKE3-256 of the kind's byte and the plaintext.
    pub fn chunk_id(&self, kind: ChunkKind, plain: &[u8]) -> ChunkId {
        let mut hasher = self.keyed.clone();
        // in one piece: after a single byte BLAKE3 takes the next KiB by themselves, and is half as fast for a chunk
        KIND_AND_PLAIN.with_borrow_mut(|whole| {
            whole.clear();
            whole.push(kind.as_byte());
            whole.extend_from_slice(plain);
            hasher.update(whole);
        });
        ChunkId::from_bytes(*hasher.finalize().as_bytes())
    }
}

// the key of a sealed repository is a secret
impl fmt::Debug for IdHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdHasher").finish_non_exhaustive()
    }
}
