//! Encoded values, frames and compression: §2 and §9.

pub type Fault = String;

pub fn check(holds: bool, fault: &str) -> Result<(), Fault> {
    if holds { Ok(()) } else { Err(fault.to_owned()) }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn unhex<const N: usize>(text: &str) -> Result<[u8; N], Fault> {
    check(text.len() == 2 * N, "a name of a wrong length")?;
    let mut bytes = [0; N];
    for (number, byte) in bytes.iter_mut().enumerate() {
        let digits = text.get(2 * number..2 * number + 2).ok_or("no digits")?;
        *byte = u8::from_str_radix(digits, 16).map_err(|error| error.to_string())?;
    }
    Ok(bytes)
}

/// A `u32` at a place that is known to be there.
pub fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
}

/// A `u64` at a place that is known to be there.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    (u32_at(bytes, at) as u64) | (u32_at(bytes, at + 4) as u64) << 32
}

/// Undoes a codec.
pub fn unpack(codec: u8, stored: &[u8], raw_len: usize) -> Result<Vec<u8>, Fault> {
    let plain = match codec {
        0 => stored.to_vec(),
        1 => zstd::bulk::decompress(stored, raw_len).map_err(|error| error.to_string())?,
        _ => return Err("an unknown codec".into()),
    };
    check(plain.len() == raw_len, "another length than stated")?;
    Ok(plain)
}

/// Returns the plaintext of a frame whose place states these lengths.
pub fn frame_plain(frame: &[u8], raw_len: usize, stored_len: usize) -> Result<Vec<u8>, Fault> {
    check(frame.get(..4) == Some(b"FRM1".as_slice()) && frame.len() == 16 + stored_len, "no frame")?;
    check(frame[5..8] == [0; 3], "a seal, or a field that is not zero")?;
    check((u32_at(frame, 8), u32_at(frame, 12)) == (raw_len, stored_len), "lengths that disagree")?;
    check(raw_len <= 4 << 20, "a frame out of bounds")?;
    unpack(frame[4], &frame[16..], raw_len)
}

/// Takes encoded values off the front of bytes.
pub struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        check(len <= self.0.len(), "a value ends early")?;
        let (head, rest) = self.0.split_at(len);
        self.0 = rest;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub fn u8(&mut self) -> Result<u8, Fault> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16, Fault> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A `u32` that counts or measures something.
    pub fn size(&mut self) -> Result<usize, Fault> {
        Ok(self.u32()? as usize)
    }

    pub fn bool(&mut self) -> Result<bool, Fault> {
        let byte = self.u8()?;
        check(byte < 2, "a bool that is neither 0 nor 1")?;
        Ok(byte == 1)
    }

    pub fn string(&mut self) -> Result<String, Fault> {
        let len = self.u64()? as usize;
        String::from_utf8(self.take(len)?.to_vec()).map_err(|error| error.to_string())
    }

    pub fn option<T>(&mut self, item: impl Fn(&mut Self) -> Result<T, Fault>) -> Result<Option<T>, Fault> {
        if self.bool()? { item(self).map(Some) } else { Ok(None) }
    }

    pub fn list<T>(&mut self, item: impl Fn(&mut Self) -> Result<T, Fault>) -> Result<Vec<T>, Fault> {
        (0..self.u64()?).map(|_| item(self)).collect()
    }

    pub fn end(&self) -> Result<(), Fault> {
        check(self.0.is_empty(), "bytes behind the end of a value")
    }
}
