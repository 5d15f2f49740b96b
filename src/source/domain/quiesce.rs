//! Keeping a domain still for the instant of a backup: frozen by its agent, paused, or both.

use std::thread;
use std::time::Duration;

use super::Freeze;
use super::ffi::{ARGUMENT_UNSUPPORTED, Guest, OPERATION_INVALID, Power};
use crate::error::{Error, Result};

/// How often thawing is tried, and resuming.
const ATTEMPTS: u32 = 3;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(500);

/// A domain that is still; it goes on when this is dropped, whatever happened meanwhile.
pub(super) struct Quiesced<'a> {
    guest: &'a Guest,
    frozen: bool,
    paused: bool,
}

impl<'a> Quiesced<'a> {
    /// Freezes and pauses as asked, and tells what did not work in `warnings`.
    ///
    /// # Errors
    /// What libvirt or the agent says, if freezing is required or pausing fails.
    pub fn begin(
        guest: &'a Guest,
        freeze: Freeze,
        pause: bool,
        has_agent: bool,
        warnings: &mut Vec<String>,
    ) -> Result<Self> {
        let mut quiesced = Self { guest, frozen: false, paused: false };
        match freeze {
            Freeze::No => {}
            // an agent that nobody set up has not failed
            Freeze::Auto if !has_agent => {}
            Freeze::Auto => {
                if let Err(error) = quiesced.freeze() {
                    warnings.push(format!("not frozen, so only crash-consistent: {error}"));
                }
            }
            Freeze::Require => quiesced.freeze()?,
        }
        if pause && guest.power().map_err(|fault| fault.at("look at", guest.object()))? == Power::Running {
            guest.suspend().map_err(|fault| fault.at("pause", guest.object()))?;
            quiesced.paused = true;
        }
        Ok(quiesced)
    }

    fn freeze(&mut self) -> Result<()> {
        let Err(fault) = self.guest.freeze() else {
            self.frozen = true;
            return Ok(());
        };
        if !matches!(fault.code, ARGUMENT_UNSUPPORTED | OPERATION_INVALID) {
            // the agent may have frozen some file systems, or do so after our patience ended
            let _ = self.guest.thaw();
        }
        Err(fault.at("freeze", self.guest.object()))
    }

    /// Returns true if the file systems are frozen.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Lets the domain go on, and tells what did not work in `warnings`.
    pub fn end(mut self, warnings: &mut Vec<String>) {
        warnings.extend(self.release());
    }

    /// Undoes in the opposite order: a paused guest cannot thaw.
    fn release(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        let name = self.guest.name();
        if std::mem::take(&mut self.paused)
            && let Err(error) =
                persist(|| self.guest.resume().map_err(|f| f.at("resume", self.guest.object())))
        {
            problems.push(format!("domain {name} is still paused (virsh resume {name}): {error}"));
        }
        if std::mem::take(&mut self.frozen)
            && let Err(error) = persist(|| self.guest.thaw().map_err(|f| f.at("thaw", self.guest.object())))
        {
            problems.push(format!("domain {name} may still be frozen (virsh domfsthaw {name}): {error}"));
        }
        problems
    }
}

fn persist(mut attempt: impl FnMut() -> Result<()>) -> Result<(), Error> {
    for _ in 1..ATTEMPTS {
        if attempt().is_ok() {
            return Ok(());
        }
        thread::sleep(BETWEEN_ATTEMPTS);
    }
    attempt()
}

impl Drop for Quiesced<'_> {
    fn drop(&mut self) {
        // only reached with something to do when begin failed or panicked: that error is what gets told
        self.release();
    }
}
