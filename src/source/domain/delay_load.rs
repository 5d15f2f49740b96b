//! libvirt's functions, looked up in its libraries when a connection is opened.
//!
//! libvirt brings some fifty libraries along, and a program that is linked with them reads them all at each start, even to
//! list points: 80 ms where they are not in memory. So the functions that vmkeep and the `virt` crate call are defined here,
//! and each calls the one of the same name in the library. LLD, which Rust brings along for x86-64 since 1.90, then finds
//! nothing that it would need the library for, and a host without libvirt can restore. Other linkers (GNU ld, gold) count
//! functions of `virt` that nobody calls: what they link works, but needs the library as before.

#![allow(unsafe_code)] // the calls below are C

use std::ffi::{c_char, c_int, c_longlong, c_uint, c_ulong, c_void};
use std::mem::ManuallyDrop;
use std::sync::OnceLock;

use libloading::Library;
use virt::sys::{
    virConnectPtr, virDomainBlockInfoPtr, virDomainCheckpointPtr, virDomainJobInfoPtr, virDomainPtr,
    virErrorFunc, virErrorPtr,
};

/// Looks the functions up, the first time: before any of them is called, so that a library that is missing is an error.
///
/// # Errors
/// Says which library cannot be loaded, or what it lacks.
pub(super) fn load() -> Result<(), String> {
    FUNCTIONS.get_or_init(Functions::look_up).as_ref().map(|_| ()).map_err(String::clone)
}

static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();

/// Returns the functions that `load` finds.
fn functions() -> &'static Functions {
    match FUNCTIONS.get_or_init(Functions::look_up) {
        Ok(functions) => functions,
        // no connection is opened without them, and there is nothing that a caller in C could be told instead
        Err(_) => std::process::abort(),
    }
}

fn open(name: &str) -> Result<ManuallyDrop<Library>, String> {
    // SAFETY: libvirt's libraries may be loaded at any time by any thread. They stay until the program ends: their threads
    // and what they registered to be called at its end do.
    unsafe { Library::new(name) }.map(ManuallyDrop::new).map_err(|error| error.to_string())
}

/// # Safety
/// The function has this type.
unsafe fn find<T: Copy>(library: &ManuallyDrop<Library>, name: &str) -> Result<T, String> {
    // SAFETY: as the caller promises; the library stays.
    unsafe { library.get::<T>(name.as_bytes()) }.map(|found| *found).map_err(|error| error.to_string())
}

macro_rules! delayed {
    ($($library:ident = $file:literal { $(fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)* })*) => {
        #[allow(non_snake_case)] // as libvirt calls them
        struct Functions {
            $($($name: unsafe extern "C" fn($($type),*) $(-> $result)?,)*)*
        }

        impl Functions {
            fn look_up() -> Result<Self, String> {
                $(let $library = open($file)?;)*
                Ok(Self {
                    // SAFETY: the types are those of libvirt's headers, as compared below; they never change a function.
                    $($($name: unsafe { find(&$library, stringify!($name)) }?,)*)*
                })
            }
        }

        $($(const _: unsafe extern "C" fn($($type),*) $(-> $result)? = virt::sys::$name;)*)*

        $($(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($arg: $type),*) $(-> $result)? {
                // SAFETY: as the caller promises: this is the function of that name.
                unsafe { (functions().$name)($($arg),*) }
            }
        )*)*
    };
}

delayed! {
    libvirt = "libvirt.so.0" {
        fn virConnectClose(connection: virConnectPtr) -> c_int;
        fn virConnectGetLibVersion(connection: virConnectPtr, version: *mut c_ulong) -> c_int;
        fn virConnectGetVersion(connection: virConnectPtr, version: *mut c_ulong) -> c_int;
        fn virConnectListAllDomains(connection: virConnectPtr, domains: *mut *mut virDomainPtr, flags: c_uint) -> c_int;
        fn virConnectOpen(name: *const c_char) -> virConnectPtr;
        fn virDomainAbortJob(domain: virDomainPtr) -> c_int;
        fn virDomainBackupBegin(
            domain: virDomainPtr, backup: *const c_char, checkpoint: *const c_char, flags: c_uint
        ) -> c_int;
        fn virDomainBackupGetXMLDesc(domain: virDomainPtr, flags: c_uint) -> *mut c_char;
        fn virDomainCheckpointCreateXML(
            domain: virDomainPtr, description: *const c_char, flags: c_uint
        ) -> virDomainCheckpointPtr;
        fn virDomainCheckpointDelete(checkpoint: virDomainCheckpointPtr, flags: c_uint) -> c_int;
        fn virDomainCheckpointFree(checkpoint: virDomainCheckpointPtr) -> c_int;
        fn virDomainCheckpointGetName(checkpoint: virDomainCheckpointPtr) -> *const c_char;
        fn virDomainCheckpointGetXMLDesc(checkpoint: virDomainCheckpointPtr, flags: c_uint) -> *mut c_char;
        fn virDomainCheckpointLookupByName(
            domain: virDomainPtr, name: *const c_char, flags: c_uint
        ) -> virDomainCheckpointPtr;
        fn virDomainFSFreeze(
            domain: virDomainPtr, mountpoints: *mut *const c_char, count: c_uint, flags: c_uint
        ) -> c_int;
        fn virDomainFSThaw(
            domain: virDomainPtr, mountpoints: *mut *const c_char, count: c_uint, flags: c_uint
        ) -> c_int;
        fn virDomainFree(domain: virDomainPtr) -> c_int;
        fn virDomainGetBlockInfo(
            domain: virDomainPtr, disk: *const c_char, info: virDomainBlockInfoPtr, flags: c_uint
        ) -> c_int;
        fn virDomainGetJobInfo(domain: virDomainPtr, info: virDomainJobInfoPtr) -> c_int;
        fn virDomainGetName(domain: virDomainPtr) -> *const c_char;
        fn virDomainGetState(domain: virDomainPtr, state: *mut c_int, reason: *mut c_int, flags: c_uint) -> c_int;
        fn virDomainGetTime(
            domain: virDomainPtr, seconds: *mut c_longlong, nanoseconds: *mut c_uint, flags: c_uint
        ) -> c_int;
        fn virDomainGetUUIDString(domain: virDomainPtr, text: *mut c_char) -> c_int;
        fn virDomainGetXMLDesc(domain: virDomainPtr, flags: c_uint) -> *mut c_char;
        fn virDomainHasManagedSaveImage(domain: virDomainPtr, flags: c_uint) -> c_int;
        fn virDomainListAllCheckpoints(
            domain: virDomainPtr, checkpoints: *mut *mut virDomainCheckpointPtr, flags: c_uint
        ) -> c_int;
        fn virDomainLookupByName(connection: virConnectPtr, name: *const c_char) -> virDomainPtr;
        fn virDomainResume(domain: virDomainPtr) -> c_int;
        fn virDomainSuspend(domain: virDomainPtr) -> c_int;
        fn virGetLastError() -> virErrorPtr;
        fn virSetErrorFunc(data: *mut c_void, handler: virErrorFunc);
    }
    libvirt_qemu = "libvirt-qemu.so.0" {
        fn virDomainQemuMonitorCommand(
            domain: virDomainPtr, command: *const c_char, answer: *mut *mut c_char, flags: c_uint
        ) -> c_int;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_functions_are_found_and_a_library_that_is_missing_is_named() {
        assert_eq!(load(), Ok(()));
        let missing = open("libvirt-is-not-called-so.so.0").map(|_| ()).unwrap_err();
        assert!(missing.contains("libvirt-is-not-called-so.so.0"), "{missing}");
    }
}
