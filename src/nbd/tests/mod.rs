//! Against servers that lie, one test a lie, and against the real `qemu-nbd`.

mod fuzz;
mod handshake;
mod honest;
mod lies;
mod peer;
mod qemu;
