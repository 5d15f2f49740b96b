//! The committed repositories below `tests/fixtures/`.

use std::path::{Path, PathBuf};

use vmkeep::format::name::Folder;
use vmkeep::monitor::Recorder;
use vmkeep::repo::{Environment, Repository, Timing};
use vmkeep::storage::local::LocalStorage;

/// Returns where a fixture is kept.
pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Returns every file of a fixture by its name in the repository, in order of the names.
pub fn files(name: &str) -> Vec<(String, Vec<u8>)> {
    fn collect(root: &Path, directory: &Path, found: &mut Vec<(String, Vec<u8>)>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(root, &path, found);
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                found.push((name, std::fs::read(&path).unwrap()));
            }
        }
    }
    let (root, mut found) = (path(name), Vec::new());
    collect(&root, &root, &mut found);
    found.sort();
    assert!(!found.is_empty(), "the fixture {name} is empty");
    found
}

/// Copies a fixture to where it may be written to, with the empty folders that git does not keep.
pub fn copy(name: &str) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    for folder in Folder::ALL.map(Folder::as_str).into_iter().chain(["tmp"]) {
        std::fs::create_dir(target.path().join(folder)).unwrap();
    }
    for (name, bytes) in files(name) {
        let path = target.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    target
}

/// The same on every host and at every time.
pub fn environment() -> Environment {
    Environment {
        host: "host".into(),
        boot_id: "boot".into(),
        process_id: 1,
        program: "vmkeep fixture".into(),
        now_ms: || 1_767_225_600_000,
        timing: Timing::default(),
    }
}

/// Opens a repository in a directory, without a local index.
pub fn open(root: &Path) -> Repository {
    let storage = Box::new(LocalStorage::open(root).unwrap());
    Repository::open(storage, None, &environment(), &Recorder::new()).unwrap()
}
