//! The libvirt calls that the `virt` crate lacks, or that it has with a flaw: with [`delay_load`] the only
//! unsafe code of vmkeep.
//!
//! `virt` 0.5 has neither checkpoints nor backup jobs nor freezing, ignores the failure of
//! `virDomainGetBlockInfo` and panics on a NUL in a URI. Everything goes through [`Guest`], whose functions
//! are safe: pointers live no longer than one of its calls.

#![allow(unsafe_code)] // the calls below are C

use std::ffi::{CStr, CString, c_char, c_int, c_longlong, c_uint, c_void};
use std::fmt;
use std::ptr;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::sys;

use super::delay_load;
use crate::error::{Error, Result};

/// `VIR_ERR_NO_DOMAIN`
pub(super) const NO_DOMAIN: i32 = 42;
/// `VIR_ERR_OPERATION_INVALID`: among others, the domain is not running.
pub(super) const OPERATION_INVALID: i32 = 55;
/// `VIR_ERR_ARGUMENT_UNSUPPORTED`: among others, no guest agent is configured.
pub(super) const ARGUMENT_UNSUPPORTED: i32 = 74;
/// `VIR_ERR_AGENT_UNRESPONSIVE`
pub(super) const AGENT_UNRESPONSIVE: i32 = 86;
/// `VIR_ERR_NO_DOMAIN_CHECKPOINT`
pub(super) const NO_DOMAIN_CHECKPOINT: i32 = 103;
/// `VIR_ERR_NO_DOMAIN_BACKUP`
pub(super) const NO_DOMAIN_BACKUP: i32 = 104;
/// `VIR_ERR_CHECKPOINT_INCONSISTENT`: a bitmap is missing or broken.
pub(super) const CHECKPOINT_INCONSISTENT: i32 = 109;

/// The most checkpoints of one domain that are looked at.
const MAX_CHECKPOINTS: usize = 65_536;

unsafe extern "C" {
    fn free(pointer: *mut c_void);
}

/// What libvirt said went wrong.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    /// A `virErrorNumber`.
    pub code: i32,
    pub message: String,
}

impl Fault {
    /// Takes this thread's last error; call it right after the call that failed.
    fn last() -> Self {
        // SAFETY: the error belongs to this thread and stays until its next libvirt call; its message is
        // NULL or a C string.
        unsafe {
            let error = sys::virGetLastError();
            if error.is_null() {
                return Self { code: 1, message: "it does not say why".into() };
            }
            let message = (*error).message;
            let text = if message.is_null() {
                String::new()
            } else {
                CStr::from_ptr(message).to_string_lossy().into_owned()
            };
            Self { code: (*error).code, message: text }
        }
    }

    /// Names the object and what was being done to it.
    pub fn at(self, action: &'static str, object: impl fmt::Display) -> Error {
        Error::Libvirt { action, object: object.to_string(), code: self.code, message: self.message }
    }
}

type Answer<T> = std::result::Result<T, Fault>;

fn c_string(text: &str) -> Answer<CString> {
    CString::new(text).map_err(|_| Fault { code: 8, message: format!("{text:?} contains a NUL") })
}

fn succeeded(result: c_int) -> Answer<c_int> {
    if result < 0 { Err(Fault::last()) } else { Ok(result) }
}

/// Takes a string that libvirt allocated, and frees it.
fn take_string(text: *mut c_char) -> Answer<String> {
    if text.is_null() {
        return Err(Fault::last());
    }
    // SAFETY: libvirt returned a C string that is ours to free with free(), once.
    unsafe {
        let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
        free(text.cast());
        Ok(owned)
    }
}

/// Whether a domain runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Power {
    Running,
    /// There is a QEMU, but the processor does not run.
    Paused,
    Off,
}

/// Which of its descriptions a domain gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Config {
    /// What runs now; of a domain that is off, what will run.
    Live,
    /// What will run after the next start.
    Inactive,
}

/// Connects read-write. Silences libvirt's own messages on stderr.
pub(super) fn connect(uri: Option<&str>) -> Result<Connect> {
    let object = || format!("libvirt at {}", uri.unwrap_or("the default URI"));
    if uri.is_some_and(|uri| uri.contains('\0')) {
        return Err(Error::Usage(format!("the libvirt URI {:?} contains a NUL", uri.unwrap_or_default())));
    }
    delay_load::load().map_err(|reason| Error::Unreachable { object: object(), reason })?;
    virt::error::clear_error_callback();
    Connect::open(uri)
        .map_err(|error| Error::Unreachable { object: object(), reason: error.message().to_owned() })
}

/// Returns the names of all domains, sorted.
pub(super) fn domain_names(connect: &Connect) -> Result<Vec<String>> {
    let listed = |error: &virt::error::Error| Error::Unreachable {
        object: "the list of libvirt's domains".into(),
        reason: error.message().to_owned(),
    };
    let domains = connect.list_all_domains(0).map_err(|error| listed(&error))?;
    let mut names = Vec::with_capacity(domains.len());
    for domain in domains {
        names.push(domain.name().map_err(|error| listed(&error))?);
    }
    names.sort_unstable();
    Ok(names)
}

/// One domain.
pub(super) struct Guest {
    domain: Domain,
    name: String,
    /// Where its libvirt is.
    uri: Option<String>,
}

/// One checkpoint, freed when dropped.
struct Checkpoint(sys::virDomainCheckpointPtr);

impl Drop for Checkpoint {
    fn drop(&mut self) {
        // SAFETY: the pointer came from libvirt with a reference that is ours, and is not used after this.
        unsafe { sys::virDomainCheckpointFree(self.0) };
    }
}

impl Guest {
    /// Finds a domain by name.
    ///
    /// # Errors
    /// [`Error::NotFound`], or what libvirt says.
    pub fn find(connect: &Connect, uri: Option<&str>, name: &str) -> Result<Self> {
        let c_name = c_string(name).map_err(|fault| Error::Usage(fault.message))?;
        // SAFETY: the connection is open as long as `connect` lives; the name is a C string; the pointer that
        // comes back carries a reference that `Domain` gives back when dropped.
        let found = unsafe {
            let pointer = sys::virDomainLookupByName(connect.as_ptr(), c_name.as_ptr());
            if pointer.is_null() { Err(Fault::last()) } else { Ok(Domain::from_ptr(pointer)) }
        };
        match found {
            Ok(domain) => Ok(Self { domain, name: name.to_owned(), uri: uri.map(str::to_owned) }),
            Err(fault) if fault.code == NO_DOMAIN => {
                Err(Error::NotFound { object: format!("domain {name}") })
            }
            Err(fault) => Err(fault.at("find", format_args!("domain {name}"))),
        }
    }

    /// Returns the domain over a new connection, if this one broke: libvirt's daemon may be restarted while a
    /// job runs, which goes on.
    ///
    /// # Errors
    /// As [`connect`] and [`Guest::find`].
    pub fn over_a_live_connection(&self) -> Result<Option<Self>> {
        match self.power() {
            Ok(_) => Ok(None),
            Err(fault) if fault.code == NO_DOMAIN => Ok(None),
            Err(_) => {
                let connection = connect(self.uri.as_deref())?;
                Self::find(&connection, self.uri.as_deref(), &self.name).map(Some)
            }
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns "domain NAME", for messages.
    pub fn object(&self) -> String {
        format!("domain {}", self.name)
    }

    fn pointer(&self) -> sys::virDomainPtr {
        // SAFETY: the pointer is only used within one function of this type, while `self.domain` lives.
        unsafe { self.domain.as_ptr() }
    }

    pub fn uuid(&self) -> Answer<String> {
        // VIR_UUID_STRING_BUFLEN
        let mut text: [c_char; 37] = [0; 37];
        // SAFETY: the buffer has the length that the call demands, and is a C string when it succeeds.
        unsafe {
            succeeded(sys::virDomainGetUUIDString(self.pointer(), text.as_mut_ptr()))?;
            Ok(CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned())
        }
    }

    pub fn power(&self) -> Answer<Power> {
        let (mut state, mut reason): (c_int, c_int) = (0, 0);
        // SAFETY: both pointers are to integers of ours.
        succeeded(unsafe { sys::virDomainGetState(self.pointer(), &mut state, &mut reason, 0) })?;
        Ok(match u32::try_from(state).unwrap_or(sys::VIR_DOMAIN_NOSTATE) {
            sys::VIR_DOMAIN_SHUTOFF | sys::VIR_DOMAIN_CRASHED => Power::Off,
            sys::VIR_DOMAIN_PAUSED | sys::VIR_DOMAIN_PMSUSPENDED => Power::Paused,
            _ => Power::Running,
        })
    }

    /// Returns true if the domain is off since its QEMU was killed, or the host crashed.
    pub fn has_crashed(&self) -> Answer<bool> {
        let (mut state, mut reason): (c_int, c_int) = (0, 0);
        // SAFETY: both pointers are to integers of ours.
        succeeded(unsafe { sys::virDomainGetState(self.pointer(), &mut state, &mut reason, 0) })?;
        let (state, reason) = (u32::try_from(state), u32::try_from(reason));
        Ok(state == Ok(sys::VIR_DOMAIN_SHUTOFF) && reason == Ok(sys::VIR_DOMAIN_SHUTOFF_CRASHED))
    }

    /// Asks the guest agent for the time: it answers, or what libvirt says tells why not. Unlike a command of
    /// our own to the agent this leaves no mark on the domain.
    pub fn agent_time(&self) -> Answer<()> {
        let (mut seconds, mut nanoseconds): (c_longlong, c_uint) = (0, 0);
        // SAFETY: both pointers are to integers of ours.
        succeeded(unsafe { sys::virDomainGetTime(self.pointer(), &mut seconds, &mut nanoseconds, 0) })?;
        Ok(())
    }

    /// Gives QEMU's monitor a command. From then on libvirt calls the domain tainted ("custom-monitor").
    pub fn ask_monitor(&self, command: &str) -> Answer<String> {
        let command = c_string(command)?;
        let mut answer: *mut c_char = ptr::null_mut();
        // SAFETY: the command is a C string; libvirt stores a string in `answer` that is ours if it succeeds.
        unsafe {
            succeeded(sys::virDomainQemuMonitorCommand(
                self.pointer(),
                command.as_ptr(),
                &mut answer,
                sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT,
            ))?;
        }
        take_string(answer)
    }

    /// Returns the domain's XML with its secrets: without them it could not be defined again.
    pub fn xml(&self, config: Config) -> Answer<String> {
        let which = if config == Config::Inactive { sys::VIR_DOMAIN_XML_INACTIVE } else { 0 };
        // SAFETY: no pointers but the domain's; the string is ours.
        take_string(unsafe { sys::virDomainGetXMLDesc(self.pointer(), sys::VIR_DOMAIN_XML_SECURE | which) })
    }

    /// Returns a disk's size in bytes, as the guest sees it.
    pub fn capacity(&self, target: &str) -> Answer<u64> {
        let target = c_string(target)?;
        let mut info = sys::virDomainBlockInfo { capacity: 0, allocation: 0, physical: 0 };
        // SAFETY: the name is a C string, the structure is ours.
        succeeded(unsafe { sys::virDomainGetBlockInfo(self.pointer(), target.as_ptr(), &mut info, 0) })?;
        Ok(info.capacity)
    }

    /// Returns true while any job runs: a backup, a migration, a save.
    pub fn has_job(&self) -> Answer<bool> {
        // SAFETY: a structure of integers is valid when zeroed.
        let mut info: sys::virDomainJobInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the structure is ours.
        succeeded(unsafe { sys::virDomainGetJobInfo(self.pointer(), &mut info) })?;
        Ok(matches!(
            u32::try_from(info.type_),
            Ok(sys::VIR_DOMAIN_JOB_BOUNDED | sys::VIR_DOMAIN_JOB_UNBOUNDED)
        ))
    }

    /// Begins a backup job and, in the same instant, makes a checkpoint.
    pub fn backup_begin(&self, backup: &str, checkpoint: Option<&str>) -> Answer<()> {
        let backup = c_string(backup)?;
        let checkpoint = checkpoint.map(c_string).transpose()?;
        let checkpoint = checkpoint.as_ref().map_or(ptr::null(), |xml| xml.as_ptr());
        // SAFETY: both are C strings that outlive the call, or NULL.
        succeeded(unsafe { sys::virDomainBackupBegin(self.pointer(), backup.as_ptr(), checkpoint, 0) })?;
        Ok(())
    }

    /// Returns the XML of the backup job that runs; `None` if none does.
    pub fn backup_xml(&self) -> Answer<Option<String>> {
        // SAFETY: no pointers but the domain's; the string is ours.
        match take_string(unsafe { sys::virDomainBackupGetXMLDesc(self.pointer(), 0) }) {
            Ok(xml) => Ok(Some(xml)),
            // a domain that is off has no job either
            Err(fault) if matches!(fault.code, NO_DOMAIN_BACKUP | OPERATION_INVALID) => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Ends the job that runs. It is gone a moment later only.
    pub fn abort_job(&self) -> Answer<()> {
        // SAFETY: no pointers but the domain's.
        succeeded(unsafe { sys::virDomainAbortJob(self.pointer()) })?;
        Ok(())
    }

    /// Returns the names of all checkpoints that libvirt knows, in no order.
    pub fn checkpoints(&self) -> Answer<Vec<String>> {
        self.list_checkpoints(0)
    }

    /// Returns the names of the checkpoints without children: after usual histories, the newest one.
    pub fn leaves(&self) -> Answer<Vec<String>> {
        self.list_checkpoints(sys::VIR_DOMAIN_CHECKPOINT_LIST_LEAVES)
    }

    fn list_checkpoints(&self, flags: u32) -> Answer<Vec<String>> {
        let mut list: *mut sys::virDomainCheckpointPtr = ptr::null_mut();
        // SAFETY: libvirt stores an array of as many checkpoints as it returns; it and they are ours.
        unsafe {
            let count = succeeded(sys::virDomainListAllCheckpoints(self.pointer(), &mut list, flags))?;
            let count = usize::try_from(count).unwrap_or(0);
            let mut names = Vec::new();
            for index in 0..count {
                let checkpoint = Checkpoint(*list.add(index));
                let name = sys::virDomainCheckpointGetName(checkpoint.0);
                if !name.is_null() && index < MAX_CHECKPOINTS {
                    names.push(CStr::from_ptr(name).to_string_lossy().into_owned());
                }
            }
            free(list.cast());
            Ok(names)
        }
    }

    fn checkpoint(&self, name: &str) -> Answer<Checkpoint> {
        let name = c_string(name)?;
        // SAFETY: the name is a C string; the pointer that comes back carries a reference of ours.
        let pointer = unsafe { sys::virDomainCheckpointLookupByName(self.pointer(), name.as_ptr(), 0) };
        if pointer.is_null() { Err(Fault::last()) } else { Ok(Checkpoint(pointer)) }
    }

    /// Returns a checkpoint's XML without the domain's; with `sizes` also how many bytes are dirty since,
    /// which needs a running domain and sound bitmaps.
    pub fn checkpoint_xml(&self, name: &str, sizes: bool) -> Answer<String> {
        let checkpoint = self.checkpoint(name)?;
        let sizes = if sizes { sys::VIR_DOMAIN_CHECKPOINT_XML_SIZE } else { 0 };
        let flags = sys::VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN | sizes;
        // SAFETY: the checkpoint lives until the end of this function; the string is ours.
        take_string(unsafe { sys::virDomainCheckpointGetXMLDesc(checkpoint.0, flags) })
    }

    /// Tells libvirt of a checkpoint whose bitmaps somebody else made. With `validate` (running domains
    /// only) the bitmaps have to be there and sound.
    pub fn checkpoint_redefine(&self, xml: &str, validate: bool) -> Answer<()> {
        let xml = c_string(xml)?;
        let validate = if validate { sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE } else { 0 };
        let flags = sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | validate;
        // SAFETY: the XML is a C string; the pointer that comes back carries a reference of ours.
        let pointer = unsafe { sys::virDomainCheckpointCreateXML(self.pointer(), xml.as_ptr(), flags) };
        if pointer.is_null() {
            return Err(Fault::last());
        }
        drop(Checkpoint(pointer));
        Ok(())
    }

    /// Deletes a checkpoint and its bitmaps (running domains only), or just what libvirt knows of it.
    pub fn checkpoint_delete(&self, name: &str, metadata_only: bool) -> Answer<()> {
        let checkpoint = self.checkpoint(name)?;
        let flags = if metadata_only { sys::VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY } else { 0 };
        // SAFETY: the checkpoint lives until the end of this function.
        succeeded(unsafe { sys::virDomainCheckpointDelete(checkpoint.0, flags) })?;
        Ok(())
    }

    /// Returns true if the domain is off with its memory saved: it will go on where it was.
    pub fn has_saved_memory(&self) -> Answer<bool> {
        // SAFETY: no pointers but the domain's.
        Ok(succeeded(unsafe { sys::virDomainHasManagedSaveImage(self.pointer(), 0) })? == 1)
    }

    /// Has the guest agent freeze all file systems.
    pub fn freeze(&self) -> Answer<()> {
        // SAFETY: no list of mount points means all of them.
        succeeded(unsafe { sys::virDomainFSFreeze(self.pointer(), ptr::null_mut(), 0, 0) })?;
        Ok(())
    }

    /// Has the guest agent thaw all file systems.
    pub fn thaw(&self) -> Answer<()> {
        // SAFETY: no list of mount points means all of them.
        succeeded(unsafe { sys::virDomainFSThaw(self.pointer(), ptr::null_mut(), 0, 0) })?;
        Ok(())
    }

    /// Stops the processor.
    pub fn suspend(&self) -> Answer<()> {
        // SAFETY: no pointers but the domain's.
        succeeded(unsafe { sys::virDomainSuspend(self.pointer()) })?;
        Ok(())
    }

    /// Lets the processor run again.
    pub fn resume(&self) -> Answer<()> {
        // SAFETY: no pointers but the domain's.
        succeeded(unsafe { sys::virDomainResume(self.pointer()) })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_are_libvirts() {
        for (ours, theirs) in [
            (NO_DOMAIN, sys::VIR_ERR_NO_DOMAIN),
            (OPERATION_INVALID, sys::VIR_ERR_OPERATION_INVALID),
            (ARGUMENT_UNSUPPORTED, sys::VIR_ERR_ARGUMENT_UNSUPPORTED),
            (AGENT_UNRESPONSIVE, sys::VIR_ERR_AGENT_UNRESPONSIVE),
            (NO_DOMAIN_CHECKPOINT, sys::VIR_ERR_NO_DOMAIN_CHECKPOINT),
            (NO_DOMAIN_BACKUP, sys::VIR_ERR_NO_DOMAIN_BACKUP),
            (CHECKPOINT_INCONSISTENT, sys::VIR_ERR_CHECKPOINT_INCONSISTENT),
        ] {
            assert_eq!(u32::try_from(ours), Ok(theirs));
        }
    }

    #[test]
    fn a_nul_is_refused_before_it_reaches_c() {
        assert!(matches!(connect(Some("test:///\0")), Err(Error::Usage(_))));
    }
}
