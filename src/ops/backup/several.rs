//! Several domains at once.
//!
//! What takes long with a domain of which little has changed is waiting: for libvirt, for the guest's agent, for the storage
//! to sync. So several are at it at the same time, each in a session of its own, which shares the repository, its local
//! index and the memory of its pipelines with the others.
//!
//! What two sessions meet at the same time is stored by both. Of domains that have a point that is little. But whatever is
//! the same in all machines comes with their first points: so of domains that have none yet one at a time is taken in.
//! That costs nothing, since one keeps all cores busy.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::BackupReport;
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::repo::Repository;

/// As many are at it at most, unless more are asked for: each domain that is being read costs its host something.
const MAX_DEFAULT_JOBS: usize = 4;

/// Returns how many domains are backed up at the same time where nobody says it.
pub fn default_jobs(cores: usize, domains: usize) -> usize {
    cores.min(MAX_DEFAULT_JOBS).min(domains).max(1)
}

/// Runs `backup` for each domain, for `jobs` of them at the same time, and hands over what became of it: on the caller's
/// thread, in the order of `domains`. One that fails keeps none of the others from being backed up. Once the monitor says
/// stop, those that have not begun are cancelled.
///
/// # Errors
/// A failed listing of the points, before anything has begun.
pub fn backup_domains(
    repository: &Repository,
    domains: &[String],
    jobs: usize,
    backup: &(dyn Fn(&str) -> Result<BackupReport> + Sync),
    monitor: &dyn Monitor,
    tell: &mut dyn FnMut(&str, Result<BackupReport>),
) -> Result<()> {
    let jobs = jobs.min(domains.len());
    if domains.len() > 1 {
        repository.keep_outcomes();
    }
    let known: HashSet<String> = match jobs > 1 {
        true => {
            repository.catalog(monitor)?.points().iter().map(|entry| entry.record.domain.clone()).collect()
        }
        // they take turns anyway
        false => HashSet::new(),
    };
    let turns = Turns::new(domains.iter().map(|domain| !known.contains(domain)));
    let one = |number: usize| {
        monitor.check()?;
        domains.get(number).map_or(Err(Error::Cancelled), |domain| backup(domain))
    };
    run(turns, jobs, &one, &mut |number, result| {
        if let Some(domain) = domains.get(number) {
            tell(domain, result);
        }
    });
    Ok(())
}

/// Runs `work` for the number of each that waits, and hands the results over in the order of the numbers.
fn run<T: Send>(
    turns: Turns,
    jobs: usize,
    work: &(dyn Fn(usize) -> T + Sync),
    tell: &mut dyn FnMut(usize, T),
) {
    let desk = &Desk { turns: Mutex::new(turns), changed: Condvar::new() };
    std::thread::scope(|scope| {
        let (sender, results) = crossbeam_channel::unbounded();
        for _ in 0..jobs {
            let sender = sender.clone();
            scope.spawn(move || {
                while let Some(number) = desk.next() {
                    let at_work = AtWork { desk, number };
                    let result = work(number);
                    drop(at_work);
                    // the receiver is there until all senders are gone
                    let _ = sender.send((number, result));
                }
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        let mut next = 0;
        for (number, result) in results {
            early.insert(number, result);
            while let Some(result) = early.remove(&next) {
                tell(next, result);
                next += 1;
            }
        }
    });
}

/// Whose turn it is.
#[derive(Debug)]
struct Turns {
    /// Numbers of those that have not begun; and whether each is new.
    waiting: VecDeque<(usize, bool)>,
    /// The new one that is at it.
    new_one: Option<usize>,
}

/// What a worker does next.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Work(usize),
    /// There is one, but not now.
    Wait,
    Over,
}

impl Turns {
    /// Lines them up; `true` is one that has no point yet.
    fn new(are_new: impl Iterator<Item = bool>) -> Self {
        Self { waiting: are_new.enumerate().collect(), new_one: None }
    }

    /// Returns the first that may begin.
    fn next(&mut self) -> Turn {
        let may_begin = |(_, is_new): &(usize, bool)| !is_new || self.new_one.is_none();
        let Some(place) = self.waiting.iter().position(may_begin) else {
            return if self.waiting.is_empty() { Turn::Over } else { Turn::Wait };
        };
        match self.waiting.remove(place) {
            Some((number, is_new)) => {
                if is_new {
                    self.new_one = Some(number);
                }
                Turn::Work(number)
            }
            None => Turn::Over,
        }
    }

    fn done(&mut self, number: usize) {
        if self.new_one == Some(number) {
            self.new_one = None;
        }
    }
}

/// Where workers get their work.
struct Desk {
    turns: Mutex<Turns>,
    changed: Condvar,
}

impl Desk {
    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn; `None` once there are no more.
    fn next(&self) -> Option<usize> {
        let mut turns = self.turns();
        loop {
            match turns.next() {
                Turn::Work(number) => return Some(number),
                Turn::Over => return None,
                Turn::Wait => turns = self.changed.wait(turns).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// One that is at it; dropped, also by a panic, it is done.
struct AtWork<'a> {
    desk: &'a Desk,
    number: usize,
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.desk.turns().done(self.number);
        self.desk.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_new_domain_at_a_time_and_the_others_go_first() {
        let mut turns = Turns::new([true, true, false, true, false].into_iter());
        assert_eq!(turns.next(), Turn::Work(0));
        assert_eq!(turns.next(), Turn::Work(2), "1 is new, and so is 0");
        assert_eq!(turns.next(), Turn::Work(4));
        assert_eq!(turns.next(), Turn::Wait);
        turns.done(2);
        assert_eq!(turns.next(), Turn::Wait);
        turns.done(0);
        assert_eq!(turns.next(), Turn::Work(1));
        assert_eq!(turns.next(), Turn::Wait);
        turns.done(1);
        assert_eq!(turns.next(), Turn::Work(3));
        assert_eq!(turns.next(), Turn::Over);
    }

    #[test]
    fn results_come_in_order_whatever_ends_first() {
        for jobs in 1..5 {
            let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let work = |number: usize| {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(3 * (8 - number as u64)));
                running.fetch_sub(1, Ordering::SeqCst);
                number * 10
            };
            let mut told = Vec::new();
            let turns = Turns::new((0..8).map(|number| number % 3 == 0));
            run(turns, jobs, &work, &mut |number, result| told.push((number, result)));
            assert_eq!(told, (0..8).map(|number| (number, number * 10)).collect::<Vec<_>>());
            assert!(most.load(Ordering::SeqCst) <= jobs);
        }
    }

    #[test]
    fn the_default_is_no_more_than_the_cores_and_the_domains() {
        let cases = [(1, 9, 1), (2, 9, 2), (64, 9, 4), (64, 3, 3), (8, 1, 1), (8, 0, 1)];
        for (cores, domains, jobs) in cases {
            assert_eq!(default_jobs(cores, domains), jobs, "{cores} cores, {domains} domains");
        }
    }
}
