//! Names of objects: the only place that builds or takes apart a path inside a repository.

use std::fmt;

use crate::id::{PackId, SegmentId, SessionId};

/// The name of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectName {
    /// `config`
    Config,
    /// `config.copy`: the same bytes once more.
    ConfigCopy,
    /// `keys/<id>`: a wrapped master key; none exists in a plain repository.
    Key(SessionId),
    /// `packs/<first two digits>/<pack id>`
    Pack(PackId),
    /// `index/<segment id>`
    Segment(SegmentId),
    /// `sessions/<session id>`
    Session(SessionId),
    /// `sessions/<session id>.hb`: the only object that is replaced.
    Heartbeat(SessionId),
    /// `outcomes/<session id>`
    Outcome(SessionId),
    /// `gc/<session id>.mark`
    Mark(SessionId),
    /// `forget/<session id>`
    Tombstone(SessionId),
    /// `bad/<pack id>.<session id>`
    Damage(PackId, SessionId),
    /// `reserve`: bytes that prune gives back first when no space is left.
    Reserve,
}

/// The folders of a repository, for listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Folder {
    Keys,
    Packs,
    Segments,
    Sessions,
    Outcomes,
    Marks,
    Tombstones,
    Damage,
}

impl Folder {
    /// Every folder.
    pub const ALL: [Self; 8] = [
        Self::Keys,
        Self::Packs,
        Self::Segments,
        Self::Sessions,
        Self::Outcomes,
        Self::Marks,
        Self::Tombstones,
        Self::Damage,
    ];

    /// Returns the folder's name in the repository, without slashes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Keys => "keys",
            Self::Packs => "packs",
            Self::Segments => "index",
            Self::Sessions => "sessions",
            Self::Outcomes => "outcomes",
            Self::Marks => "gc",
            Self::Tombstones => "forget",
            Self::Damage => "bad",
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config => f.write_str("config"),
            Self::ConfigCopy => f.write_str("config.copy"),
            Self::Key(id) => write!(f, "keys/{id}"),
            Self::Pack(id) => {
                let hex = id.to_hex();
                write!(f, "packs/{}/{hex}", hex.get(..2).unwrap_or_default())
            }
            Self::Segment(id) => write!(f, "index/{id}"),
            Self::Session(id) => write!(f, "sessions/{id}"),
            Self::Heartbeat(id) => write!(f, "sessions/{id}.hb"),
            Self::Outcome(id) => write!(f, "outcomes/{id}"),
            Self::Mark(id) => write!(f, "gc/{id}.mark"),
            Self::Tombstone(id) => write!(f, "forget/{id}"),
            Self::Damage(pack, id) => write!(f, "bad/{pack}.{id}"),
            Self::Reserve => f.write_str("reserve"),
        }
    }
}

impl ObjectName {
    /// Returns the folder it is in; `None` at the top level.
    pub const fn folder(self) -> Option<Folder> {
        Some(match self {
            Self::Config | Self::ConfigCopy | Self::Reserve => return None,
            Self::Key(_) => Folder::Keys,
            Self::Pack(_) => Folder::Packs,
            Self::Segment(_) => Folder::Segments,
            Self::Session(_) | Self::Heartbeat(_) => Folder::Sessions,
            Self::Outcome(_) => Folder::Outcomes,
            Self::Mark(_) => Folder::Marks,
            Self::Tombstone(_) => Folder::Tombstones,
            Self::Damage(..) => Folder::Damage,
        })
    }

    /// Takes a path apart; `None` for a name that no object has (left-over temporary files, foreign files).
    pub fn parse(path: &str) -> Option<Self> {
        let Some((folder, rest)) = path.split_once('/') else {
            return match path {
                "config" => Some(Self::Config),
                "config.copy" => Some(Self::ConfigCopy),
                "reserve" => Some(Self::Reserve),
                _ => None,
            };
        };
        Some(match folder {
            "keys" => Self::Key(rest.parse().ok()?),
            "packs" => {
                // one spelling per object: `packs/00/<id that starts with ff>` is no object
                let (start, id) = rest.split_once('/')?;
                let is_its = start.len() == 2 && id.starts_with(start);
                is_its.then(|| id.parse().ok().map(Self::Pack))??
            }
            "index" => Self::Segment(rest.parse().ok()?),
            "sessions" => match rest.strip_suffix(".hb") {
                Some(id) => Self::Heartbeat(id.parse().ok()?),
                None => Self::Session(rest.parse().ok()?),
            },
            "outcomes" => Self::Outcome(rest.parse().ok()?),
            "gc" => Self::Mark(rest.strip_suffix(".mark")?.parse().ok()?),
            "forget" => Self::Tombstone(rest.parse().ok()?),
            "bad" => {
                let (pack, session) = rest.split_once('.')?;
                Self::Damage(pack.parse().ok()?, session.parse().ok()?)
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_go_there_and_back() {
        let sid = SessionId::from_bytes([7; 16]);
        let pack = PackId::from_bytes([0xab; 32]);
        for name in [
            ObjectName::Config,
            ObjectName::ConfigCopy,
            ObjectName::Reserve,
            ObjectName::Key(sid),
            ObjectName::Pack(pack),
            ObjectName::Segment(SegmentId::from_bytes([3; 32])),
            ObjectName::Session(sid),
            ObjectName::Heartbeat(sid),
            ObjectName::Outcome(sid),
            ObjectName::Mark(sid),
            ObjectName::Tombstone(sid),
            ObjectName::Damage(pack, sid),
        ] {
            let path = name.to_string();
            assert_eq!(ObjectName::parse(&path), Some(name));
            assert_eq!(name.folder().map(Folder::as_str), path.split_once('/').map(|(folder, _)| folder));
        }
    }

    #[test]
    fn a_pack_in_the_wrong_folder_is_no_object() {
        let path = format!("packs/00/{}", PackId::from_bytes([0xab; 32]));
        assert_eq!(ObjectName::parse(&path), None);
        assert_eq!(ObjectName::parse("index/../config"), None);
        assert_eq!(ObjectName::parse("outcomes/"), None);
    }

    proptest! {
        /// Nothing else is an object's name than what it is written as.
        #[test]
        fn an_object_has_one_spelling(
            bytes in any::<[u8; 32]>(),
            number in 0..6usize,
            at in any::<prop::sample::Index>(),
            with in "[0-9a-fA-F./ ~é]{0,2}",
        ) {
            let (pack, session) = (PackId::from_bytes(bytes), SessionId::from_bytes(*bytes.first_chunk().unwrap()));
            let names = [
                ObjectName::Pack(pack),
                ObjectName::Segment(SegmentId::from_bytes(bytes)),
                ObjectName::Heartbeat(session),
                ObjectName::Outcome(session),
                ObjectName::Mark(session),
                ObjectName::Damage(pack, session),
            ];
            let mut path = names[number].to_string();
            let at = at.index(path.len());
            path.replace_range(at..=at, &with);
            if let Some(name) = ObjectName::parse(&path) {
                prop_assert_eq!(name.to_string(), path);
            }
        }
    }
}
