//! Where chunks end.

use fastcdc::v2020::{self, Normalization};

use crate::error::{Error, Result};
use crate::format::config::CutterParams;
use crate::format::limits::BLOCK_LEN;

// a block is far below 4 GiB
#[allow(clippy::cast_possible_truncation)]
const BLOCK: usize = BLOCK_LEN as usize;

/// Cuts runs into chunks by their content (FastCDC, 2020), on 4 KiB boundaries.
///
/// File systems place files on 4 KiB boundaries, so a file that stands elsewhere on another disk is cut
/// alike. A cut moves up, to the end of the block that it falls into: what decides it stays inside the chunk.
#[derive(Debug, Clone)]
pub struct Cutter {
    min_len: usize,
    average_len: usize,
    max_len: usize,
    /// Harder to meet, below the average length.
    strict_mask: u64,
    /// Easier to meet, above it.
    loose_mask: u64,
}

impl Cutter {
    /// Creates a cutter.
    ///
    /// # Errors
    /// [`Error::Malformed`] if a parameter is out of the format's bounds.
    pub fn new(params: CutterParams) -> Result<Self> {
        params.check().map_err(|fault| Error::malformed("the cutter of the repository", fault))?;
        let average_len = params.average_len as usize;
        let (strict_mask, loose_mask) = v2020::select_masks(average_len, Normalization::Level1);
        Ok(Self {
            min_len: params.min_len as usize,
            average_len,
            max_len: params.max_len as usize,
            strict_mask,
            loose_mask,
        })
    }

    /// Returns the lengths of the chunks of a run, in order; they add up to the run's length.
    ///
    /// The run starts on a 4 KiB boundary of the disk. Every chunk is a multiple of 4 KiB between the shortest
    /// and the longest length, but the last, which has what is left.
    pub fn cut<'a>(&'a self, run: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
        let mut rest = run;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let len = self.first_cut(rest);
            rest = rest.get(len..).unwrap_or_default();
            Some(len)
        })
    }

    fn first_cut(&self, rest: &[u8]) -> usize {
        let (_, cut) = v2020::cut(
            rest,
            self.min_len,
            self.average_len,
            self.max_len,
            self.strict_mask,
            self.loose_mask,
            self.strict_mask << 1,
            self.loose_mask << 1,
        );
        // the longest length is a multiple of the block, so this does not pass it
        cut.next_multiple_of(BLOCK).min(rest.len())
    }
}
