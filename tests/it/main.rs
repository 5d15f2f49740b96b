//! Tests of the whole: one binary, one module per subject.

mod cli;
mod damage;
mod decoder;
mod doctor;
mod domain;
mod fixtures;
mod format;
mod full_disk;
mod fuzz;
mod golden;
mod guest;
mod hostile_bytes;
mod hostile_repository;
mod house;
mod killed;
mod mending;
mod mutate;
mod order_of_writes;
mod power_cut;
mod readme;
mod retention;
mod several;
mod soak;
mod support;
mod verify;
mod week;
