//! Content that was written to again and again, a little each time: it is read in the order of the frames it stands in.

use super::*;
use crate::ops::content::DiskRead;
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

/// How the newest point is read.
struct Reading {
    limits: Limits,
    on_damage: OnDamage,
    /// Ends the reading before so many reads of packs.
    cancel_at: usize,
}

impl Reading {
    fn by(limits: Limits) -> Self {
        Self { limits, on_damage: OnDamage::Fail, cancel_at: usize::MAX }
    }

    /// Returns what was read and reported, in bytes of the disk, and how often packs were read.
    fn read(&self, world: &World, sink: &dyn Sink) -> (Result<DiskRead>, u64, usize) {
        let (monitor, reads) = (Arc::new(Recorder::new()), Arc::new(AtomicUsize::new(0)));
        let (cancelled, count, cancel_at) = (Arc::clone(&monitor), Arc::clone(&reads), self.cancel_at);
        let storage = HookedStorage::new(&world.storage).before_read(move |name| {
            let is_pack = matches!(name, ObjectName::Pack(_));
            if is_pack && count.fetch_add(1, Ordering::Relaxed) >= cancel_at {
                cancelled.cancel();
            }
        });
        let silent = Recorder::new();
        let repository = Repository::open(Box::new(storage), None, &environment(), &silent).unwrap();
        let (catalog, view) = repository.refresh(&silent).unwrap();
        let reader = ChunkReader::sparing(&repository, &view);
        let manifest = &catalog.points().last().unwrap().record.disks[0].manifest;
        let reported = AtomicUsize::new(0);
        let advance = |bytes: u64| {
            reported.fetch_add(bytes as usize, Ordering::Relaxed);
        };
        let read = read_disk_by(&reader, manifest, sink, self.on_damage, &*monitor, &advance, self.limits);
        (read, reported.into_inner() as u64, reads.load(Ordering::Relaxed))
    }

    /// Returns what was read, and the disk that came of it.
    fn content(&self, world: &World) -> (DiskRead, Vec<u8>) {
        let sink = Buffer(Mutex::new(vec![0xee; world.content(0).len()]));
        let read = self.read(world, &sink).0.unwrap();
        (read, sink.0.into_inner().unwrap())
    }
}

/// By these the disk is gathered in three parts: batches have 4 MiB.
const PARTS: Limits = Limits { content_len: 5 << 20, ..Limits::EVERYTHING };

/// Spoils some of what the first point stored and the newest one still needs, all of it behind the disk's first third.
fn spoil_the_end(world: &World) {
    let packs = world.storage.list(Folder::Packs).unwrap();
    let longest = packs.iter().max_by_key(|pack| world.storage.len(pack.name).unwrap()).unwrap().name;
    world.storage.tamper(longest, |mut bytes| {
        // what a point still needs of a chunk is a block here and there
        bytes.iter_mut().skip(9 << 20).step_by(40 << 10).for_each(|byte| *byte ^= 1);
        Some(bytes)
    });
}

#[test]
fn what_is_scattered_is_read_in_the_order_of_its_frames() {
    let world = written_all_over();
    let scattered = Limits { frames_len: 10 << 20, ..Limits::default() };
    let never = Limits { frames_len: u64::MAX, ..scattered };
    let only_short = Limits { piece_len: 64, ..scattered };
    let (by_frames, by_disk) = (Places::default(), Places::default());
    let (_, reported, reads) = Reading::by(scattered).read(&world, &by_frames);
    let (_, also_reported, more_reads) = Reading::by(never).read(&world, &by_disk);
    let (_, _, of_long) = Reading::by(only_short).read(&world, &Places::default());
    assert_eq!((reported, also_reported), (LEN, LEN));
    // each frame once: 16 of the first point, and of each other point one, its table and its map; else they come again for
    // each batch, since the cache holds 8 MiB
    assert!(reads <= 20 + 3 * POINTS as usize + 10, "{reads}");
    assert!(more_reads > reads + 2 * POINTS as usize, "{more_reads}");
    assert!(of_long > reads + 2 * POINTS as usize, "{of_long}");
    for Places(places) in [by_frames, by_disk] {
        let mut places = places.into_inner().unwrap();
        places.sort_unstable();
        let end = places.iter().try_fold(0, |end, (offset, len)| (end == *offset).then_some(end + len));
        assert_eq!(end, Some(LEN), "every byte once");
    }
}

#[test]
fn what_is_read_together_is_the_disk() {
    let world = written_all_over();
    for limits in [Limits::EVERYTHING, PARTS, Limits { pieces: 1500, ..Limits::EVERYTHING }] {
        let (read, content) = Reading::by(limits).content(&world);
        assert!(content == world.content(0));
        assert!(read.missing.is_empty());
    }
}

#[test]
fn a_little_between_what_is_scattered_is_gathered_with_it() {
    // 4 MiB at the beginning and further on are in pieces of 8 points, 8 or 24 MiB between them are not
    let [together, apart] = [12u64, 28].map(|second| {
        let mut world = World::new(&[36 << 20]);
        write(&mut world, 0, 36 << 20, 1);
        world.backup(RequestedLevel::Auto);
        for point in 0..8 {
            for block in (point..1024).step_by(12) {
                write(&mut world, block * BLOCK, BLOCK, 10_000 + block);
                write(&mut world, (second << 20) + block * BLOCK, BLOCK, 20_000 + block);
            }
            world.backup(RequestedLevel::Auto);
        }
        let limits = Limits { frames_len: 5 << 20, spread: 1, ..Limits::default() };
        let (_, content) = Reading::by(limits).content(&world);
        assert!(content == world.content(0), "{second}");
        let never = Limits { frames_len: u64::MAX, ..limits };
        [limits, never].map(|limits| Reading::by(limits).read(&world, &Places::default()).2)
    });
    // each point's frame is opened once or twice, and for each batch where nothing is gathered; how often the frames of the
    // first point are opened again depends on which worker comes first
    assert!(together[0] + 6 <= apart[0], "{together:?}, {apart:?}");
    for [gathered, never] in [together, apart] {
        assert!(gathered * 4 <= never, "{gathered}, {never}");
    }
}

#[test]
fn no_more_is_read_ahead_than_there_is_room_for() {
    let world = written_all_over();
    let little = Limits { content_len: 1 << 20, ..Limits::EVERYTHING };
    let (_, content) = Reading::by(little).content(&world);
    assert!(content == world.content(0));
    // of each batch a fourth is read ahead: the rest comes as if nothing were
    let (_, _, reads) = Reading::by(little).read(&world, &Places::default());
    let (_, _, of_all) = Reading::by(Limits::EVERYTHING).read(&world, &Places::default());
    assert!(reads > of_all + POINTS as usize, "{reads}, {of_all}");
}

#[test]
fn a_failure_ends_the_reading() {
    let world = written_all_over();
    let packs = world.storage.list(Folder::Packs).unwrap();
    let longest = packs.iter().max_by_key(|pack| world.storage.len(pack.name).unwrap()).unwrap().name;
    world.storage.tamper(longest, |bytes| Some(bytes[..4096].to_vec()));
    for limits in [Limits::default(), Limits::EVERYTHING] {
        let (read, reported, reads) = Reading::by(limits).read(&world, &Places::default());
        assert!(read.unwrap_err().is_damage());
        // no worker goes on to the end, and a frame is not tried for each piece
        assert!(reported <= 8 << 20, "{reported}");
        assert!(reads < 150, "{reads}");
    }
}

#[test]
fn scattered_content_that_is_lost_is_named_or_given_as_zeroes() {
    let world = written_all_over();
    spoil_the_end(&world);
    let never = Limits { frames_len: u64::MAX, ..Limits::default() };
    let zero = |limits| Reading { on_damage: OnDamage::Zero, ..Reading::by(limits) }.content(&world);
    let (read, content) = zero(never);
    assert!(!read.missing.is_empty());
    for limits in [Limits::EVERYTHING, PARTS] {
        assert!(zero(limits) == (read.clone(), content.clone()));
        let failure = Reading::by(limits).read(&world, &Places::default()).0.unwrap_err();
        assert!(failure.is_damage(), "{failure}");
        let named = read.missing.iter().any(|range| failure.to_string().contains(&range.start().to_string()));
        assert!(named, "{failure}");
    }
}

#[test]
fn reading_what_is_scattered_can_be_cancelled() {
    let world = written_all_over();
    let reading = Reading::by(Limits::EVERYTHING);
    let (_, _, reads) = reading.read(&world, &Places::default());
    // by then the map was read
    let cancel_at = reads - 12;
    let (read, _, until_then) = Reading { cancel_at, ..reading }.read(&world, &Places::default());
    assert!(matches!(read, Err(Error::Cancelled)), "{read:?}");
    // each thread may be at work on a frame
    let most = cancel_at + 2 + rayon::current_num_threads();
    assert!((cancel_at..most).contains(&until_then), "{until_then} of {reads}");
}
