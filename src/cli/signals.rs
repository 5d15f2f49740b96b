//! Ctrl-C and its relatives: the first asks the work to stop, the second ends the program at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmkeep::error::{Error, Result};

use super::exit::Exit;

/// Makes the signals set `cancelled`. A command calls it once it has asked all its questions: until then, a
/// signal ends the program as it would any other.
///
/// # Errors
/// [`Error::Io`] if the system refuses.
pub fn install(cancelled: &Arc<AtomicBool>) -> Result<()> {
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // under nohup the loss of the terminal is no reason to stop
        if signal == SIGHUP && is_ignored(signal) {
            continue;
        }
        let exit_code = i32::from(Exit::Cancelled.code());
        // the order is what makes the second signal, and only it, end the program: hooks run as registered
        signal_hook::flag::register_conditional_shutdown(signal, exit_code, Arc::clone(cancelled))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(cancelled)))
            .map_err(|error| Error::io("install", "a signal handler", error))?;
    }
    Ok(())
}

fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    let bit = u32::try_from(signal).ok().and_then(|signal| signal.checked_sub(1));
    bit.is_some_and(|bit| mask.checked_shr(bit).unwrap_or(0) & 1 == 1)
}
