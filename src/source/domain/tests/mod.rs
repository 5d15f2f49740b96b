//! On real domains of a private libvirt daemon (`tests/lab/lab.sh`): every backup is compared, byte by byte, with
//! what the guest would have read.

mod keeper;
mod off;
mod running;
