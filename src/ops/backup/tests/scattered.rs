//! Content that was written to again and again, a little each time: it is read in the order of the frames it stands in.

use super::*;
use crate::format::point::Manifest;
use crate::storage::hooked::HookedStorage;

/// More than the cache of a reader that spares memory holds, and four batches.
const LEN: u64 = 16 << 20;
const POINTS: u64 = 20;

/// Returns a disk of which each point wrote every 24th block, and zeroed a block near the end.
fn written_all_over() -> World {
    let mut world = World::new(&[LEN]);
    write(&mut world, 0, LEN, 1);
    world.backup(RequestedLevel::Auto);
    for point in 0..POINTS {
        for block in (point..LEN / BLOCK).step_by(24) {
            write(&mut world, block * BLOCK, BLOCK, 10_000 + block);
        }
        world.disk(0).change(LEN - (3 * point + 1) * BLOCK, BLOCK, |bytes| bytes.fill(0));
        world.backup(RequestedLevel::Auto);
    }
    world.kept.drain(..POINTS as usize);
    world
}

/// Notes what it is given.
#[derive(Default)]
struct Places(Mutex<Vec<(u64, u64)>>);

impl Sink for Places {
    fn write(&self, contents: Vec<DiskBytes>) -> Result<()> {
        let places = contents.iter().map(|content| (content.offset, content.bytes.len() as u64));
        self.0.lock().unwrap().extend(places);
        Ok(())
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        self.0.lock().unwrap().push((range.start(), range.len()));
        Ok(())
    }
}

/// Reads the newest point as [`read_disk_by`] does. Returns how many bytes of the disk were reported, and how often a pack was
/// read.
fn read(world: &World, sink: &dyn Sink, limits: Limits, monitor: &Recorder) -> Result<(u64, usize)> {
    let reads = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&reads);
    let storage = HookedStorage::new(&world.storage).before_read(move |name| {
        count.fetch_add(usize::from(matches!(name, ObjectName::Pack(_))), Ordering::Relaxed);
    });
    let repository = Repository::open(Box::new(storage), None, &environment(), &Recorder::new()).unwrap();
    let (catalog, view) = repository.refresh(&Recorder::new()).unwrap();
    let reader = ChunkReader::sparing(&repository, &view);
    let manifest: &Manifest = &catalog.points().last().unwrap().record.disks[0].manifest;
    let reported = AtomicUsize::new(0);
    let advance = |bytes: u64| {
        reported.fetch_add(bytes as usize, Ordering::Relaxed);
    };
    read_disk_by(&reader, manifest, sink, OnDamage::Fail, monitor, &advance, limits)?;
    Ok((reported.into_inner() as u64, reads.load(Ordering::Relaxed)))
}

#[test]
fn what_is_scattered_is_read_in_the_order_of_its_frames() {
    let world = written_all_over();
    world.check_reads();
    let scattered = Limits { frames_len: 10 << 20, ..Limits::default() };
    let unlike = Limits { frames_len: u64::MAX, ..Limits::default() };
    let long = Limits { piece_len: 64, ..scattered };
    let (in_frames, by_disk) = (Places::default(), Places::default());
    let (reported, reads) = read(&world, &in_frames, scattered, &Recorder::new()).unwrap();
    let (as_reported, more_reads) = read(&world, &by_disk, unlike, &Recorder::new()).unwrap();
    assert_eq!((reported, as_reported), (LEN, LEN));
    // each frame once: 16 of the first point, and of each other point one, its table and its map; else they come again for each
    // batch, since the cache holds 8 MiB
    assert!(reads <= 20 + 3 * POINTS as usize + 10, "{reads}");
    assert!(more_reads > reads + 2 * POINTS as usize, "{more_reads}");
    let (_, of_long) = read(&world, &Places::default(), long, &Recorder::new()).unwrap();
    assert!(of_long > reads + 2 * POINTS as usize, "{of_long}");
    for Places(places) in [in_frames, by_disk] {
        let mut places = places.into_inner().unwrap();
        places.sort_unstable();
        let end = places.iter().try_fold(0, |end, (offset, len)| (end == *offset).then_some(end + len));
        assert_eq!(end, Some(LEN), "every byte once");
    }
}

#[test]
fn pieces_that_are_read_together_are_given_as_one() {
    let world = written_all_over();
    let sink = Places::default();
    read(&world, &sink, Limits { frames_len: 0, ..Limits::default() }, &Recorder::new()).unwrap();
    let places = sink.0.into_inner().unwrap();
    // four batches and more, and what stands between zeroes
    assert!(places.len() <= 8 + 2 * POINTS as usize, "{}", places.len());
}

#[test]
fn scattered_content_that_is_lost_is_named() {
    let mut world = written_all_over();
    let packs = world.storage.list(Folder::Packs).unwrap();
    let longest = packs.iter().max_by_key(|pack| world.storage.len(pack.name).unwrap()).unwrap().name;
    // what a point still needs is a block here and there
    world.storage.tamper(longest, |mut bytes| {
        bytes.iter_mut().skip(4 << 20).step_by(4 << 10).for_each(|byte| *byte ^= 1);
        Some(bytes)
    });
    world.reopen();
    let failure = read(&world, &Places::default(), Limits::TIGHT, &Recorder::new()).unwrap_err();
    assert!(failure.is_damage());
    assert!(failure.to_string().contains("cannot be read"), "{failure}");
}

#[test]
fn reading_what_is_scattered_can_be_cancelled() {
    let world = written_all_over();
    let monitor = Recorder::new();
    monitor.cancel();
    let failure = read(&world, &Places::default(), Limits::TIGHT, &monitor).unwrap_err();
    assert!(matches!(failure, Error::Cancelled), "{failure}");
}
