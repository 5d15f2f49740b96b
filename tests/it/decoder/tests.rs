use super::content::{nvram, vda, vdb};
use super::{Repository, envelope, hex};
use crate::fixtures;

/// Hashes of what the two points hold: they catch a change of `content` together with the fixture.
const HASHES: [[&str; 3]; 2] = [
    [
        "7e0c58e6f0bc4a510ebf1e1649d4a6d8578a3746cdaa96f153fc86e5edee2a8f", // vda
        "79ba8a4ec9d57494d27b4600d5ebcf2058d25c3ab611845ed3967818b1ef4aa0", // vdb
        "ab0985b617c7b800a443d72ca79db219d62dc2f95b32f560706975da6745f575", // nvram
    ],
    [
        "65326641ea017e61fafa936891facccac8422a9ff9e308688fc3d8195d1ec7dc", // vda
        "0484ef3b4687ec34a39c510b1664fbc48836b221ebdba4926845bb7d56821a69", // vdb
        "7f2267340bf68bc5968243f72326aceceb7c034d432a6f0266bb2c1633dfcc25", // nvram
    ],
];

/// How a reader learns where chunks are.
type Load = fn(&mut Repository) -> Result<(), String>;

fn assert_restores(load: Load) {
    let root = fixtures::copy("two_points");
    let mut repository = Repository::open(root.path()).unwrap();
    load(&mut repository).unwrap();
    let points = repository.points();
    assert_eq!(points.len(), 2, "the third point is forgotten, the fourth session was aborted");
    for point in points {
        assert_eq!(point.domain, "web");
        let number = usize::from(point.disks[1].1.size != vdb(0).len() as u64);
        let expected = [("vda", vda(number)), ("vdb", vdb(number)), ("nvram", nvram(number))];
        let maps: Vec<_> = point.disks.iter().chain(&point.files).collect();
        assert_eq!(maps.len(), expected.len());
        for (((name, manifest), (expected_name, expected)), hash) in
            maps.into_iter().zip(expected).zip(HASHES[number])
        {
            assert_eq!(name, expected_name);
            let disk = repository.restore(manifest).unwrap();
            assert!(disk == expected, "{name} of point {number} is not what was backed up");
            assert_eq!(hex(blake3::hash(&disk).as_bytes()), hash, "{name} of point {number}");
        }
    }
}

#[test]
fn restores_by_segments() {
    assert_restores(Repository::load_segments);
}

#[test]
fn restores_by_the_tables_of_packs() {
    assert_restores(Repository::load_pack_tables);
}

#[test]
fn restores_by_scanning_for_frames() {
    assert_restores(Repository::scan_packs);
}

#[test]
fn restores_the_smallest_repository() {
    let root = fixtures::copy("smallest");
    let mut repository = Repository::open(root.path()).unwrap();
    repository.load_segments().unwrap();
    let points = repository.points();
    let mut expected = vec![b'v'; 4096];
    expected.resize(8192, 0);
    assert_eq!(repository.restore(&points[0].disks[0].1).unwrap(), expected);
}

#[test]
fn restores_by_the_copy_of_config() {
    for damage in [None, Some(0), Some(8), Some(70)] {
        let root = fixtures::copy("smallest");
        let (config, copy) = (root.path().join("config"), root.path().join("config.copy"));
        let mut bytes = std::fs::read(&config).unwrap();
        match damage {
            None => std::fs::rename(&config, &copy).unwrap(),
            Some(at) => {
                bytes[at] ^= 1;
                std::fs::copy(&config, &copy).unwrap();
                std::fs::write(&config, &bytes).unwrap();
            }
        }
        let mut repository = Repository::open(root.path()).unwrap();
        repository.load_segments().unwrap();
        let points = repository.points();
        assert_eq!(repository.restore(&points[0].disks[0].1).unwrap()[..4096], [b'v'; 4096]);
        std::fs::remove_file(&copy).unwrap();
        assert!(Repository::open(root.path()).is_err());
    }
}

#[test]
fn any_one_pack_of_metadata_may_be_lost() {
    let root = fixtures::copy("two_points");
    let mut repository = Repository::open(root.path()).unwrap();
    repository.load_segments().unwrap();
    let nodes = repository.places.values().filter(|places| places[0].kind != 0);
    for places in nodes {
        assert_eq!(places.len(), 2, "a node or point copy stands in two packs");
        assert_ne!(places[0].pack, places[1].pack);
    }
}

#[test]
fn points_have_copies() {
    let root = fixtures::copy("two_points");
    let mut repository = Repository::open(root.path()).unwrap();
    repository.scan_packs().unwrap();
    let outcome = |id: &[u8; 16]| std::fs::read(root.path().join("outcomes").join(hex(id))).unwrap();
    for point in repository.points() {
        let (_, body) = envelope(&outcome(&point.id), b"vmkpOUTC").unwrap();
        let copies = repository.places.iter().filter(|(_, places)| places[0].kind == 2);
        let found = copies.map(|(id, _)| repository.chunk(2, id).unwrap());
        assert_eq!(found.filter(|copy| body[4..].starts_with(copy)).count(), 1);
    }
}

/// So that the two readers cannot share a mistake.
#[test]
fn this_reader_is_small_and_stands_alone() {
    let own = [include_str!("mod.rs"), include_str!("read.rs")];
    let lines = own.iter().flat_map(|source| source.lines()).map(str::trim_start);
    let code: Vec<&str> = lines.filter(|line| !line.is_empty() && !line.starts_with("//")).collect();
    assert!(code.len() <= 500, "{} lines", code.len());
    for line in code {
        assert!(!line.contains("vmkeep") && !line.contains("fixtures"), "{line}");
    }
}
