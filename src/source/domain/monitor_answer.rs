//! What QEMU's monitor answers when it is asked for its bitmaps.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::{Error, FormatFault, Result};

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    image: Image,
    #[serde(rename = "dirty-bitmaps", default)]
    bitmaps: Vec<RawBitmap>,
}

#[derive(Deserialize)]
struct Image {
    filename: String,
}

#[derive(Deserialize)]
struct RawBitmap {
    /// Without one it is QEMU's own.
    name: Option<String>,
    #[serde(default)]
    count: u64,
    #[serde(default)]
    recording: bool,
    #[serde(default)]
    busy: bool,
    #[serde(default)]
    inconsistent: bool,
}

/// A bitmap by QEMU's own account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QemuBitmap {
    pub recording: bool,
    pub busy: bool,
    pub inconsistent: bool,
    /// Bytes dirty.
    pub dirty_bytes: u64,
}

/// The bitmaps of each image by the image's name, and then by their own.
pub(super) type QemuBitmaps = BTreeMap<String, BTreeMap<String, QemuBitmap>>;

/// Reads the answer to `query-named-block-nodes`.
///
/// # Errors
/// [`Error::Malformed`]
pub(super) fn read_bitmaps(object: &str, text: &str) -> Result<QemuBitmaps> {
    let answer: Answer = serde_json::from_str(text).map_err(|error| {
        let object = format!("what the QEMU of {object} says of its bitmaps");
        Error::malformed(object, FormatFault::Decode(error.to_string()))
    })?;
    let mut found = QemuBitmaps::new();
    for node in answer.nodes {
        let of_image = found.entry(node.image.filename).or_default();
        for RawBitmap { name, count, recording, busy, inconsistent } in node.bitmaps {
            if let Some(name) = name {
                of_image.insert(name, QemuBitmap { recording, busy, inconsistent, dirty_bytes: count });
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_are_read_by_image_and_name() {
        let text = r#"{"return":[{"image":{"filename":"/a"},"dirty-bitmaps":[{"name":"x","count":65536,
            "recording":true,"busy":false,"persistent":true,"granularity":65536},{"count":1,"recording":true,
            "busy":true,"granularity":1}],"node-name":"n"},{"image":{"filename":"/a"}},{"image":{"filename":"/b"},
            "dirty-bitmaps":[{"name":"x","count":0,"recording":false,"inconsistent":true}]}],"id":"libvirt-1"}"#;
        let found = read_bitmaps("domain x", text).unwrap();
        let sound = QemuBitmap { recording: true, busy: false, inconsistent: false, dirty_bytes: 65536 };
        assert_eq!(found["/a"].len(), 1);
        assert_eq!(found["/a"]["x"], sound);
        assert!(found["/b"]["x"].inconsistent);
        assert!(read_bitmaps("domain x", "{}").is_err());
    }
}
