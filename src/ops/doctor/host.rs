//! What is wrong with the host: libvirt, QEMU's tools, the repository, the cache, the place for scratch files.

use std::path::Path;

use rustix::fs::{Access, access};

use super::{Diagnosis, DoctorOptions, HostFacts, Surroundings, shown, told};
use crate::error::{Error, ErrorClass, Result};
use crate::monitor::Monitor;
use crate::source::domain::{ScratchPlace, Version, Versions, scratch_place};
use crate::source::qemu_nbd::tool_version;

/// From here on libvirt promises incremental backups.
const OLDEST_LIBVIRT: Version = Version(7, 6, 0);
const OLDEST_QEMU: Version = Version(6, 1, 0);

/// Returns what is wrong, whatever domains there are.
///
/// # Errors
/// [`Error::Unreachable`] if libvirt is, and a domain is named.
pub(super) fn examine(
    surroundings: &Surroundings<'_>,
    options: &DoctorOptions,
    host: &mut HostFacts,
    monitor: &dyn Monitor,
) -> Result<Vec<Diagnosis>> {
    let mut found = Vec::new();
    match surroundings.hypervisor {
        Err(Error::Unreachable { object, reason }) if options.domain.is_some() => {
            return Err(Error::Unreachable { object: object.clone(), reason: reason.clone() });
        }
        Err(error) => found.push(no_libvirt(error)),
        Ok(hypervisor) => match hypervisor.versions() {
            Ok(versions) => {
                host.libvirt = Some(versions.libvirt.to_string());
                host.qemu = versions.qemu.map(|version| version.to_string());
                found.extend(too_old(versions));
            }
            Err(error) => found.push(no_libvirt(&error)),
        },
    }
    host.qemu_img = tool("qemu-img", &mut found);
    host.qemu_nbd = tool("qemu-nbd", &mut found);
    found.extend(repository(surroundings, monitor));
    if let Some(cache_dir) = &options.cache_dir {
        found.extend(cache(cache_dir, &surroundings.remarks));
    }
    found.extend(place(&scratch_place(options.scratch_dir.as_deref())));
    Ok(found)
}

fn no_libvirt(error: &Error) -> Diagnosis {
    Diagnosis::problem("libvirt-unreachable", told(error))
        .means("no domain can be backed up; only images, block devices and NBD exports can")
        .advise("try `virsh -c URI list` with the same URI; is the daemon running, and may you connect?")
}

pub(super) fn too_old(versions: Versions) -> Vec<Diagnosis> {
    let old = |what: &str, found: Version, oldest: Version| {
        Diagnosis::problem(
            "too-old",
            format!("{what} is of version {found}, and incremental backups need {oldest}"),
        )
        .means("backups may fail (\"incremental backup is not supported yet\"), or be fulls each time")
        .advise("upgrade it, and start the domains anew")
    };
    let mut problems = Vec::new();
    if versions.libvirt < OLDEST_LIBVIRT {
        problems.push(old("libvirt", versions.libvirt, OLDEST_LIBVIRT));
    }
    match versions.qemu {
        Some(qemu) if qemu < OLDEST_QEMU => problems.push(old("QEMU", qemu, OLDEST_QEMU)),
        Some(_) => {}
        None => problems.push(
            Diagnosis::problem("no-qemu", "libvirt finds no QEMU that it could run")
                .means("no domain can be started; those that are off can still be backed up")
                .advise("install it: Debian's package is qemu-system-x86"),
        ),
    }
    problems
}

fn tool(program: &'static str, found: &mut Vec<Diagnosis>) -> Option<String> {
    match tool_version(program) {
        Ok(version) => Some(version),
        Err(error) => {
            found.push(
                Diagnosis::problem("tool-missing", format!("{program}: {}", told(&error)))
                    .means("domains that are off cannot be backed up, nor points be restored as qcow2")
                    .advise("install QEMU's tools: Debian's package is qemu-utils"),
            );
            None
        }
    }
}

fn repository(surroundings: &Surroundings<'_>, monitor: &dyn Monitor) -> Vec<Diagnosis> {
    let unusable = |error: &Error| {
        let kind = match error.class() {
            ErrorClass::NoRepository => "no-repository",
            ErrorClass::Usage => "repository-not-named",
            ErrorClass::Damage => "repository-damaged",
            _ => "repository-unreachable",
        };
        let hint = error
            .hint()
            .unwrap_or_else(|| "name it with -r, VMKEEP_REPOSITORY or in a profile; is it mounted?".into());
        Diagnosis::problem(kind, told(error))
            .means("no backup can be made, and it is not known which checkpoints are whose: none is touched")
            .advise(hint)
    };
    let repository = match surroundings.repository {
        Ok(repository) => repository,
        Err(error) => return vec![unusable(error)],
    };
    let catalog = match repository.catalog(monitor) {
        Ok(catalog) => catalog,
        Err(error) => return vec![unusable(&error)],
    };
    let problems = catalog.problems().iter().map(|(name, problem)| {
        Diagnosis::problem("repository-damaged", format!("{name}: {problem}"))
            .means("a point may be missing; a checkpoint of it is taken for one that no point names")
            .advise("`vmkeep verify --structure` names what is lost")
    });
    problems.collect()
}

/// Returns why a directory, or the one in which it would be made, cannot be written.
fn not_writable(path: &Path) -> Option<String> {
    let nearest = path.ancestors().find(|ancestor| ancestor.exists())?;
    let said = if nearest.is_dir() { None } else { Some("it is no directory".to_owned()) };
    let said = said.or_else(|| {
        let refused = access(nearest, Access::WRITE_OK | Access::EXEC_OK).err();
        refused.map(|error| std::io::Error::from(error).to_string())
    })?;
    Some(if nearest == path { said } else { format!("{}: {said}", nearest.display()) })
}

pub(super) fn cache(cache_dir: &Path, remarks: &[String]) -> Vec<Diagnosis> {
    if let Some(reason) = not_writable(cache_dir) {
        let what = format!("the cache directory {} cannot be used: {reason}", shown(cache_dir));
        return vec![
            Diagnosis::problem("cache-unusable", what)
                .means(
                    "the local index is built in memory at each start, and nothing keeps two backups of a domain from \
                     running at once",
                )
                .advise("make it writable, or name another one: VMKEEP_CACHE_DIR, or cache-dir in a profile"),
        ];
    }
    let told = remarks.iter().map(|remark| {
        Diagnosis::note("local-index", remark.clone())
            .means("this run took longer to begin; nothing else")
            .advise("nothing is to be done: the local index is a cache")
    });
    told.collect()
}

pub(super) fn place(place: &ScratchPlace) -> Option<Diagnosis> {
    let path = shown(&place.path);
    let what = match &place.free {
        _ if place.excess > 0 => {
            format!("the scratch directory {path} is {} bytes too long for a socket in it", place.excess)
        }
        Err(reason) => format!("the scratch directory {path} cannot be used: {reason}"),
        Ok(_) => return None,
    };
    Some(
        Diagnosis::problem("scratch-directory", what)
            .means("no backup of a running domain begins")
            .advise("name another one with --scratch-dir, or scratch-dir in the profile"),
    )
}
