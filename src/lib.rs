//! A content-addressed, deduplicating backup repository for libvirt/QEMU virtual machines.
//!
//! A *repository* keeps *points*. A point is one backup of one domain at one instant: a complete map of every disk,
//! whatever its *level* (full, incremental, differential, copy). The level says how the point was made and what it
//! is compared with; a restore never needs it. Disk content is cut into *chunks*, each stored once. `repo-format.md`
//! defines every byte and the order of writes.
//!
//! # How the data flows
//!
//! ```text
//! domain: checkpoint, backup job ──┐
//! NBD export, dirty bitmap ────────┼─► source ── extents ──► compare with the ──► cut ──► known? ──► frame ──► pack
//! image file, block device ────────┘     dirty, zero, hole   predecessor's map    │    (index)     zstd       │
//!                                                                                 ▼                           ▼
//!                     outcome = point ◄── new root ◄── nodes that changed ◄── manifest        index segment, storage
//!
//! restore, verify, diff ◄── manifest ◄── root          reader: index ──► range of a pack ──► decompress ──► check the id
//! prune: choose ──► mark ──► fence sessions ──► what is live, anew ──► write anew ──► outcome = sweep ──► delete
//! ```
//!
//! *Compare first*: a dirty extent is 64 KiB because the bitmap is; only the 4 KiB blocks of it that differ from the
//! predecessor go on. *One map, copy on write*: a new point shares every node of the tree below which nothing changed.
//! *Decide once*: every change is a *session*, which ends in one *outcome* that is created exclusively; what a session
//! wrote counts if its outcome says so. No clock, lock or listing order decides anything.
//!
//! # Layers
//!
//! A module uses only the layers below its own, never a sibling; a test reads the sources and says who does not.
//!
//! | layer | modules | what they do |
//! |---|---|---|
//! | L0 | [`id`] [`buffer`] [`extent`] | newtypes; memory for content; sets of ranges |
//! | L1 | [`error`] | errors by object, not by library |
//! | L2 | [`format`](mod@format) [`monitor`] | bytes to structs and back, pure; progress, warnings, cancelling |
//! | L3 | [`storage`] [`chunk`] [`nbd`] | named objects; cut, name, frame and pack; the NBD protocol |
//! | L4 | [`index`] [`manifest`] [`source`] | where chunks are; trees that map disks; where disks come from |
//! | L5 | [`repo`] | sessions, what counts, the writer's pipeline, the reader that checks |
//! | L6 | [`ops`] | one verb per file: `verb(&Repository, &VerbOptions, &dyn Monitor) -> Result<VerbReport>` |
//! | | the program | arguments to options, reports to text or JSON, errors to exit codes |
//!
//! The library never prints, reads the environment or asks the clock except through its arguments. `unsafe` code is in two
//! files, for the calls to libvirt that the `virt` crate lacks and for loading its library when a domain is asked for.
//! libvirt and RocksDB are features, both on by default.
//!
//! # Invariants
//!
//! | | always | guarded by |
//! |---|---|---|
//! | I1 | A point's manifests are complete: a restore reads no other point. | `every_point_restores_whatever_happened` `what_only_forgotten_points_had_is_gone` |
//! | I2 | Objects are created once, never changed, and no name is used again. | `objects_are_created_once_and_names_are_not_used_again` |
//! | I3 | Nothing counts without a committed outcome; after it the point is complete and durable. | `killed_fifty_times_and_still_fine` `no_crash_at_any_step_loses_anything` `whichever_operation_fails_and_however` `the_power_goes_at_any_moment` |
//! | I4 | All disks of a domain commit together, as one point of one instant. | `a_week_of_a_domain_restores_day_by_day` |
//! | I5 | Every byte restored was checked against its chunk id; every difference is a finding that names point, disk and range. | `no_damage_is_restored_as_if_it_were_content` `a_flipped_bit_is_found_wherever_it_is` |
//! | I6 | A restore equals what the guest would have read, zeroes included. | `a_week_of_a_domain_restores_day_by_day` `every_point_restores_whatever_happened` |
//! | I7 | The local index may be lost, stale or wrong at any time: only speed suffers. | `each_file_may_be_gone_cut_or_overwritten` `the_index_on_disk_answers_as_the_one_in_memory` `the_index_is_lost_spoilt_or_locked_at_any_moment` |
//! | I8 | Prune deletes nothing that a committed point reaches, whatever clocks, pauses and concurrent writers do. | `cut_off_after_any_change_it_loses_nothing_and_the_next_one_succeeds` `a_running_backup_is_waited_for_and_loses_nothing` `a_missing_live_chunk_stops_it` `no_schedule_loses_anything` `each_rule_that_is_taken_away_is_missed` `each_moment_is_survived_by_its_rule_only` `everything_at_once` |
//! | I9 | A checkpoint serves as a base only if a committed point names it and its bitmap is there and consistent; else the disk is read in full and the report says why. A backup that failed leaves the domain as it was. | `every_reason_for_a_full_is_given` `bitmap_or_metadata_gone` `a_cancelled_run_leaves_the_domain_as_it_was` |
//! | I10 | Nothing is stored twice because of its level; only a full that is asked for cuts anew what small writes have left in pieces. | `a_week_of_levels_stores_nothing_twice` `the_same_content_elsewhere_is_stored_once` |

#![deny(unsafe_code)]
// unit tests may panic, that is how they fail; the library may not
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation))]

pub mod buffer;
pub mod chunk;
pub mod error;
pub mod extent;
pub mod format;
pub mod id;
pub mod index;
pub mod manifest;
pub mod monitor;
pub mod nbd;
pub mod ops;
pub mod repo;
pub mod source;
pub mod storage;

#[cfg(test)]
#[path = "../tests/it/mutate.rs"]
mod mutate;
