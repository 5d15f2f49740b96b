//! Registrations, marks and damage records: no point needs them, and nobody fails for one that cannot be read; so nobody else
//! says so.

use super::Findings;
use crate::error::{Error, FormatFault, Result};
use crate::format::envelope::ObjectKind;
use crate::format::name::ObjectName;
use crate::format::session::{Damage, Mark, SessionRecord};
use crate::repo::Repository;
use crate::storage::Listed;

/// Reads those of the listed objects, and reports what is wrong with them. (Outcomes and tombstones are read with the
/// catalog.)
pub(super) fn check(repository: &Repository, listed: &[Listed], findings: &mut Findings) -> Result<()> {
    for Listed { name, .. } in listed {
        let kind = match name {
            ObjectName::Session(_) => ObjectKind::Session,
            ObjectName::Damage(..) => ObjectKind::Damage,
            ObjectName::Mark(_) => ObjectKind::Mark,
            _ => continue,
        };
        let bytes = match repository.storage().get(*name, kind.max_object_len()) {
            // over since it was listed
            Err(Error::NotFound { .. }) => continue,
            Err(error) if repository.is_of_object(&error) => {
                findings.at(name.to_string(), &error.cause());
                continue;
            }
            other => other?,
        };
        if let Err(fault) = decode(repository, *name, &bytes) {
            findings.at(name.to_string(), &fault.to_string());
        }
    }
    Ok(())
}

fn decode(repository: &Repository, name: ObjectName, bytes: &[u8]) -> Result<(), FormatFault> {
    match name {
        ObjectName::Damage(pack, _) => {
            let found = Damage::from_object(bytes, repository.id())?.pack;
            if found == pack {
                return Ok(());
            }
            let (found, expected) = (found.to_string(), pack.to_string());
            Err(FormatFault::Mismatch { what: "the pack it speaks of", found, expected })
        }
        ObjectName::Mark(_) => Mark::from_object(bytes, repository.id()).map(drop),
        _ => SessionRecord::from_object(bytes, repository.id()).map(drop),
    }
}
