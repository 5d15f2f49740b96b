//! What is wrong with one domain: pure judgement of what was seen of it.

use std::path::Path;

use super::{Diagnosis, Remedy};
use crate::ops::checkpoints::{CheckpointReport, DiskBitmap, Known, Standing, describe};
use crate::source::domain::{
    AgentFacts, BaseCheckpoint, BitmapState, DiskFacts, DomainFacts, JobFacts, MIN_SCRATCH_BYTES,
    SCRATCH_SHARE, ScratchPlace,
};

/// What a second backup job is told by libvirt while one runs.
const STATE_LOCK: &str = "after half a minute libvirt says \"Timed out during operation: cannot acquire state change \
                          lock (held by monitor=remoteDispatchDomainBackupBegin)\"";

/// The kind of [`gone`].
pub(super) const GONE: &str = "checkpoint-gone";

/// What the judgement depends on beside the domain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case<'a> {
    /// What the repository knows; `None` if there is none to ask.
    pub known: Option<&'a Known>,
    pub place: &'a ScratchPlace,
    /// The user named this domain.
    pub named: bool,
    /// The user wants another program's job ended.
    pub end_job: bool,
}

/// Returns all that is wrong with a domain.
pub(super) fn examine(facts: &DomainFacts, case: &Case<'_>) -> Vec<Diagnosis> {
    let mut found: Vec<Diagnosis> = job(facts, case).into_iter().collect();
    found.extend(agent(facts, case));
    found.extend(facts.disks.iter().filter_map(|disk| obstacle(facts, disk)));
    found.extend(scratch(facts, case.place));
    if facts.saved_memory {
        found.push(
            Diagnosis::note("saved-memory", "the domain's memory is saved (virsh managedsave)")
                .means("a backup keeps the disks of a running system, as after a power cut")
                .advise("start it before the backup, or accept that"),
        );
    }
    let nobody = Known::default();
    let known = case.known.unwrap_or(&nobody);
    for checkpoint in describe(facts, known) {
        found.extend(judge(facts, case, known, &checkpoint));
    }
    for diagnosis in &mut found {
        diagnosis.domain = Some(facts.name.clone());
    }
    found
}

fn socket_of(socket: &Path) -> String {
    format!("NBD socket {}", socket.display())
}

fn job(facts: &DomainFacts, case: &Case<'_>) -> Option<Diagnosis> {
    let name = &facts.name;
    Some(match &facts.job {
        JobFacts::None => return None,
        JobFacts::Killed { socket } => {
            let what =
                format!("the backup job of a vmkeep that was killed still runs ({})", socket_of(socket));
            Diagnosis::problem("job-of-killed-run", what)
                .means(format!(
                    "its scratch files grow with what the guest writes; other programs' backups fail: {STATE_LOCK}. The \
                     next backup of vmkeep ends it"
                ))
                .advise(format!("`vmkeep doctor {name} --fix`, or the next backup"))
                .mend_by(Remedy::EndDeadJob { socket: socket.clone() })
        }
        JobFacts::Alive { socket } => {
            Diagnosis::note("job-running", format!("a vmkeep is backing it up now ({})", socket_of(socket)))
                .means("another backup is refused as busy until it has ended")
                .advise("wait for it")
        }
        JobFacts::Foreign { socket } => {
            let socket_text = socket.as_deref().map_or_else(|| "without a unix socket".to_owned(), socket_of);
            let what = format!("another backup job, of another program, runs on the domain ({socket_text})");
            let found = Diagnosis::problem("job-of-another-program", what)
                .means(format!("no backup can begin: vmkeep says that the domain is busy; of others, {STATE_LOCK}"))
                .advise(format!(
                    "wait for that program; if it is gone, `vmkeep doctor {name} --fix --end-job` or `virsh domjobabort \
                     {name}` ends its job"
                ));
            match case.end_job && case.named {
                true => found.mend_by(Remedy::EndForeignJob { socket: socket.clone() }),
                false => found,
            }
        }
        JobFacts::Other => {
            Diagnosis::note("other-job", "libvirt runs another job on the domain: a migration or a save")
                .means("no backup can begin until it has ended")
                .advise(format!("`virsh domjobinfo {name}` tells which"))
        }
    })
}

fn agent(facts: &DomainFacts, case: &Case<'_>) -> Option<Diagnosis> {
    let name = &facts.name;
    match &facts.agent {
        AgentFacts::Unasked | AgentFacts::Answers => None,
        AgentFacts::NoChannel => Some(
            Diagnosis::note("no-agent", "QEMU guest agent is not configured: the domain has no channel for it")
                .means("file systems are not frozen: points are as after a power cut, and --freeze require fails")
                .advise("add the channel org.qemu.guest_agent.0 and install qemu-guest-agent in the guest"),
        ),
        AgentFacts::Silent(reason) => Some(
            Diagnosis::problem("agent-silent", format!("Guest agent is not responding: {reason}"))
                .means("each backup tries to freeze and warns; points are as after a power cut, --freeze require fails")
                .advise("start qemu-guest-agent in the guest, or take its channel out of the domain"),
        ),
        // for the instant of a backup that is as it should be
        AgentFacts::Frozen if matches!(facts.job, JobFacts::Alive { .. }) => None,
        AgentFacts::Frozen if case.known.is_some_and(|known| known.at_work) => None,
        AgentFacts::Frozen => {
            let what = "the guest's file systems are frozen (\"the agent is in frozen state\"), and no vmkeep is at work";
            let found = Diagnosis::problem("frozen", what)
                .means("whoever writes in the guest hangs; --freeze require fails")
                .advise(format!("`virsh domfsthaw {name}`, or `vmkeep doctor {name} --fix`"));
            // unnamed it may be somebody's snapshot that takes this very moment
            Some(if case.named { found.mend_by(Remedy::Thaw) } else { found })
        }
    }
}

/// Returns why a disk has no bitmap, or cannot be read at all.
fn obstacle(facts: &DomainFacts, disk: &DiskFacts) -> Option<Diagnosis> {
    if disk.left_out.is_some() {
        return None;
    }
    let target = &disk.target;
    if let Some(reason) = &disk.unreadable {
        let what = format!("disk {target} cannot be read: {reason}");
        let found = Diagnosis::problem("unreadable-disk", what).of_disk(target);
        return Some(match facts.running {
            true => found.means("a backup fails").advise("see what libvirt's log says of the disk"),
            false => found.means("a backup of the domain while it is off fails").advise(format!(
                "start the domain, bring the image back, or leave the disk out with -x {target}"
            )),
        });
    }
    if disk.format != "qcow2" {
        let what = format!(
            "disk {target} keeps no dirty bitmap: checkpoint for disk {target} unsupported for storage type {}",
            disk.format
        );
        let found = Diagnosis::note("no-bitmaps", what).of_disk(target);
        return Some(
            found
                .means("it is read in full each time; only what changed is stored")
                .advise("convert it to qcow2 if that takes too long"),
        );
    }
    if disk.is_old_qcow2 {
        let image = disk.image.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
        let what =
            format!("disk {target} can have no dirty bitmap: its image is of qcow2 version 2 (compat 0.10)");
        let found = Diagnosis::note("old-qcow2", what).of_disk(target);
        return Some(
            found
                .means("it is read in full each time; only what changed is stored")
                .advise(format!("while the domain is off: `qemu-img amend -o compat=1.1 {image}`")),
        );
    }
    None
}

fn scratch(facts: &DomainFacts, place: &ScratchPlace) -> Option<Diagnosis> {
    let Ok(free) = place.free else { return None };
    let backed_up = facts.disks.iter().filter(|disk| disk.left_out.is_none());
    let disks = backed_up.filter_map(|disk| disk.size).fold(0, u64::saturating_add);
    let path = place.path.display();
    let advice = "make room, or name another directory with --scratch-dir";
    if free < disks.min(MIN_SCRATCH_BYTES) {
        let what = format!(
            "scratch directory {path}: {free} bytes are free, at least {MIN_SCRATCH_BYTES} are needed"
        );
        return Some(
            Diagnosis::problem("scratch-space", what)
                .means("no backup of the running domain begins: without space, the guest's own writes would fail")
                .advise(advice),
        );
    }
    (free < disks / SCRATCH_SHARE).then(|| {
        let what = format!("only {free} bytes are free in {path}, less than a tenth of the size of the domain's disks");
        Diagnosis::note("scratch-space", what)
            .means("if the guest overwrites more than that during a backup, its writes fail: No space left on device")
            .advise(advice)
    })
}

/// Judges one checkpoint, or what is left of one.
fn judge(
    facts: &DomainFacts,
    case: &Case<'_>,
    known: &Known,
    checkpoint: &CheckpointReport,
) -> Vec<Diagnosis> {
    let found = match checkpoint.standing {
        Standing::AtWork => return Vec::new(),
        Standing::OtherRepository | Standing::Foreign => others(facts, case, checkpoint),
        standing if standing.is_needed() => needed(facts, known, checkpoint),
        _ => vec![superfluous(facts, checkpoint)],
    };
    found.into_iter().map(|diagnosis| diagnosis.of_checkpoint(&checkpoint.name)).collect()
}

fn targets<'a>(disks: impl IntoIterator<Item = &'a DiskBitmap>) -> Vec<String> {
    disks.into_iter().map(|disk| disk.disk.clone()).collect()
}

/// A checkpoint of ours that no backup is made since.
fn superfluous(facts: &DomainFacts, checkpoint: &CheckpointReport) -> Diagnosis {
    let name = &checkpoint.name;
    let disks = targets(&checkpoint.disks);
    let point = checkpoint.point.map(|point| point.short()).unwrap_or_default();
    let mut found = match (checkpoint.created, checkpoint.standing) {
        (None, _) => Diagnosis::problem(
            "bitmap-without-checkpoint",
            format!(
                "bitmap {name} is left on {} without a checkpoint, and no backup needs it (creating one of that name would \
                 say \"Bitmap already exists: {name}\")",
                disks.join(", ")
            ),
        ),
        (_, Standing::Superseded) => Diagnosis::problem(
            "superseded-checkpoint",
            format!("checkpoint {name} of point {point} is still there, though newer points took its place"),
        ),
        // until the next backup that is as it should be
        (_, Standing::Forgotten) => Diagnosis::note(
            "forgotten-checkpoint",
            format!("checkpoint {name} is of point {point}, which was forgotten"),
        ),
        _ => Diagnosis::problem(
            "leftover-checkpoint",
            format!(
                "checkpoint {name} is of this repository, but no point names it: its backup was killed, or its point \
                 forgotten and pruned"
            ),
        ),
    };
    found.disks.clone_from(&disks);
    found
        .means("the next backup is not affected; its bitmaps cost the guest memory, and each write a little time")
        .advise(format!("`vmkeep doctor {} --fix` or the next backup deletes it", facts.name))
        .mend_by(Remedy::DeleteCheckpoint { name: name.clone(), disks })
}

/// Somebody else's: named, and never touched.
fn others(facts: &DomainFacts, case: &Case<'_>, checkpoint: &CheckpointReport) -> Vec<Diagnosis> {
    let (name, domain) = (&checkpoint.name, &facts.name);
    // without a repository it is not known whose a checkpoint of a vmkeep is
    let owner = match checkpoint.standing {
        Standing::OtherRepository if case.known.is_none() => "a vmkeep repository",
        Standing::OtherRepository => "another repository",
        _ => "another program",
    };
    let with_it = match checkpoint.standing {
        Standing::OtherRepository => {
            format!("`vmkeep -r REPO doctor {domain} --fix` with that repository mends it")
        }
        _ => format!("its program should mend it; `virsh checkpoint-delete {domain} {name}` deletes it"),
    };
    if checkpoint.created.is_none() {
        let image =
            facts.disks.iter().find(|disk| checkpoint.disks.iter().any(|found| found.disk == disk.target));
        let image = image.and_then(|disk| disk.image.as_deref()).map(|path| path.display().to_string());
        let what = format!(
            "bitmap {name} of {owner} is on {} without a checkpoint of libvirt",
            targets(&checkpoint.disks).join(", ")
        );
        let mut found = Diagnosis::note("foreign-bitmap", what)
            .means(format!("nothing for vmkeep; who creates a checkpoint {name} is told \"Bitmap already exists\""))
            .advise(format!(
                "leave it to its owner; while the domain is off, `qemu-img bitmap --remove {} {name}` removes it",
                image.unwrap_or_else(|| "IMAGE".into())
            ));
        found.disks = targets(&checkpoint.disks);
        return vec![found];
    }
    let lost: Vec<&DiskBitmap> = checkpoint.disks.iter().filter(|disk| disk.state.is_lost()).collect();
    let Some(first) = lost.first() else { return Vec::new() };
    let mut found = Diagnosis::note(
        "foreign-checkpoint-broken",
        format!("checkpoint {name} of {owner} is inconsistent: {}", state_text(first, name)),
    )
    .means("nothing for the next backup to this repository; an incremental since it fails")
    .advise(with_it);
    found.disks = targets(lost);
    vec![found]
}

/// Says what is wrong with a bitmap in the words of libvirt and QEMU.
fn state_text(bitmap: &DiskBitmap, name: &str) -> String {
    let disk = &bitmap.disk;
    let libvirt = format!("missing or broken bitmap '{name}' for disk '{disk}'");
    match bitmap.state {
        BitmapState::Missing => format!("{libvirt}; bitmap '{name}' not found in backing chain of '{disk}'"),
        BitmapState::Inconsistent => format!("{libvirt}; Bitmap '{name}' is inconsistent and cannot be used"),
        BitmapState::Disabled => format!("bitmap '{name}' of disk '{disk}' is disabled: it does not record"),
        _ => libvirt,
    }
}

/// A checkpoint that the next backup may be made since.
fn needed(facts: &DomainFacts, known: &Known, checkpoint: &CheckpointReport) -> Vec<Diagnosis> {
    let Some(base) = known.needed().find(|base| base.name == checkpoint.name) else { return Vec::new() };
    let mut found = Vec::new();
    if checkpoint.created.is_none() {
        found.extend(lost_by_libvirt(facts, known, checkpoint, base));
    }
    let broken: Vec<&DiskBitmap> = checkpoint.disks.iter().filter(|disk| is_broken(disk)).collect();
    for state in [BitmapState::Missing, BitmapState::Inconsistent, BitmapState::Disabled, BitmapState::Broken]
    {
        let of_state: Vec<&DiskBitmap> = broken.iter().copied().filter(|disk| disk.state == state).collect();
        if let Some(first) = of_state.first() {
            found.push(broken_bitmaps(facts, checkpoint, first, targets(of_state.iter().copied())));
        }
    }
    let untracked = |disk: &&DiskFacts| {
        disk.can_track()
            && disk.unreadable.is_none()
            && base.disks.iter().all(|(target, _)| *target != disk.target)
    };
    if checkpoint.standing != Standing::LastFull {
        found.extend(facts.disks.iter().filter(untracked).map(|disk| {
            let what = format!("checkpoint {} did not track disk {}", checkpoint.name, disk.target);
            let found = Diagnosis::note("untracked-disk", what).of_disk(&disk.target);
            found
                .means("the next backup reads it in full; from then on it is tracked")
                .advise(format!("`vmkeep backup {}`", facts.name))
        }));
    }
    let spread: Vec<&DiskBitmap> =
        checkpoint.disks.iter().filter(|disk| disk.state == BitmapState::Spread).collect();
    if !spread.is_empty() {
        let mut note = Diagnosis::note(
            "spread-bitmap",
            format!("dirty bitmap of checkpoint {} is spread over a chain of images", checkpoint.name),
        )
        .means("a backup while the domain is off reads these disks in full; while it runs, QEMU adds the bitmaps up")
        .advise("start the domain before the backup, or commit the external snapshot");
        note.disks = targets(spread);
        found.push(note);
    }
    found
}

/// A bitmap that is lost and of which something is left: at least libvirt's word that it is there.
fn is_broken(disk: &DiskBitmap) -> bool {
    disk.state.is_lost() && (disk.tracked || disk.state != BitmapState::Missing)
}

fn serves(facts: &DomainFacts, standing: Standing) -> String {
    let name = &facts.name;
    match standing {
        Standing::LastFull => {
            format!("only `vmkeep backup {name} -l diff --reread` would read these disks in full; other backups do not")
        }
        _ => "the next backup reads these disks in full, and stores only what changed; the one after it is incremental \
              again"
            .into(),
    }
}

fn broken_bitmaps(
    facts: &DomainFacts,
    checkpoint: &CheckpointReport,
    first: &DiskBitmap,
    disks: Vec<String>,
) -> Diagnosis {
    let name = &checkpoint.name;
    let (kind, why) = match first.state {
        BitmapState::Missing => ("bitmap-missing", "somebody removed it, or the image was replaced"),
        BitmapState::Inconsistent => ("bitmap-inconsistent", "QEMU was killed, or the host crashed"),
        BitmapState::Disabled => ("bitmap-disabled", "somebody disabled it"),
        _ => ("bitmap-broken", "QEMU was killed, the host crashed, or the image was replaced"),
    };
    let what = format!("checkpoint inconsistent: {} ({why})", state_text(first, name));
    let all_lost = checkpoint.disks.iter().all(|disk| disk.state.is_lost());
    let broken: Vec<String> = targets(checkpoint.disks.iter().filter(|disk| is_broken(disk)));
    let mut found = Diagnosis::problem(kind, what).means(serves(facts, checkpoint.standing)).advise(format!(
        "`vmkeep doctor {} --fix`, then a backup; a backup alone does it as well",
        facts.name
    ));
    found.disks = disks;
    let name = name.clone();
    match checkpoint.created.is_none() || all_lost {
        // others of its bitmaps are sound, and libvirt has to be told of them first
        true if !all_lost => found,
        true => found.mend_by(Remedy::DeleteCheckpoint { name, disks: broken }),
        false => found.mend_by(Remedy::NarrowCheckpoint { name, broken }),
    }
}

/// A checkpoint that libvirt does not know any more.
fn lost_by_libvirt(
    facts: &DomainFacts,
    known: &Known,
    checkpoint: &CheckpointReport,
    base: &BaseCheckpoint,
) -> Option<Diagnosis> {
    let name = &checkpoint.name;
    let there: Vec<&DiskBitmap> = checkpoint
        .disks
        .iter()
        .filter(|disk| !disk.state.is_lost() && disk.state != BitmapState::Spread)
        .collect();
    let unsure = facts.running && !facts.asked_qemu && checkpoint.disks.is_empty();
    if there.is_empty() && !unsure {
        // the last full's is deleted once it serves no disk
        return (checkpoint.standing != Standing::LastFull).then(|| gone(&facts.name, name));
    }
    if unsure && checkpoint.standing == Standing::LastFull {
        return None;
    }
    let mut base = base.clone();
    let has_disk =
        |target: &String| facts.disks.iter().any(|disk| disk.target == *target && disk.can_track());
    base.disks
        .retain(|(target, _)| has_disk(target) && (unsure || there.iter().any(|disk| disk.disk == *target)));
    if base.disks.is_empty() {
        return Some(gone(&facts.name, name));
    }
    let text = format!("Checkpoint '{name}' for incremental backup not found: libvirt does not know it");
    let mut found = match unsure {
        false => {
            Diagnosis::problem("checkpoint-unknown-to-libvirt", format!("{text}, but its bitmaps are there"))
        }
        true => Diagnosis::note(
            "checkpoint-unknown-to-libvirt",
            format!("{text}; QEMU may still have its bitmaps"),
        ),
    };
    found.disks = base.disks.iter().map(|(target, _)| target.clone()).collect();
    let created = known.time_ms(name).unwrap_or(0) / 1000;
    Some(
        found
            .means("the next backup tells libvirt of it, and is incremental if its bitmaps are sound, else reads in full")
            .advise(format!("`vmkeep doctor {} --fix`, or just the next backup", facts.name))
            .mend_by(Remedy::TellCheckpoint { base, created }),
    )
}

/// A checkpoint of which nothing is left: there is nothing to mend, and a backup makes a new one.
pub(super) fn gone(domain: &str, name: &str) -> Diagnosis {
    let mut found = Diagnosis::note(GONE, format!("checkpoint {name} is gone, and its bitmaps with it"))
        .means("the next backup reads in full, and stores only what changed; the one after it is incremental again")
        .advise(format!("`vmkeep backup {domain}`"))
        .of_checkpoint(name);
    found.domain = Some(domain.to_owned());
    found
}
