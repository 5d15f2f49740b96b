//! NBD URIs, as the NBD project's `doc/uri.md` defines them: `nbd://` and `nbd+unix://`.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{Address, DEFAULT_PORT, MAX_STRING_BYTES};
use crate::error::Error;

/// A server and one of its exports.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NbdUri {
    pub address: Address,
    /// The empty name is the server's default export.
    pub export: String,
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "export {:?} at {}", self.export, self.address)
    }
}

impl FromStr for NbdUri {
    type Err = Error;

    /// Reads `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.
    fn from_str(uri: &str) -> Result<Self, Error> {
        parse(uri).map_err(|reason| Error::Usage(format!("{uri:?} is not a usable NBD URI: {reason}")))
    }
}

fn parse(uri: &str) -> Result<NbdUri, String> {
    let (scheme, rest) = uri.split_once("://").ok_or("there is no `://` in it")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    if rest.contains('#') || query.contains('#') {
        return Err("a fragment means nothing here".into());
    }
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = String::from_utf8(percent_decoded(path)?).map_err(|_| "the export name is not UTF-8")?;
    check_export(&export)?;
    let address = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => tcp_address(authority, query)?,
        "nbd+unix" => unix_address(authority, query)?,
        "nbds" | "nbds+unix" | "nbds+vsock" => return Err("TLS is not supported".into()),
        other => return Err(format!("the scheme {other:?} is neither nbd nor nbd+unix")),
    };
    Ok(NbdUri { address, export })
}

/// Refuses export names that the protocol cannot carry.
pub(super) fn check_export(export: &str) -> Result<(), String> {
    if export.len() > MAX_STRING_BYTES {
        return Err(format!("the export name has {} bytes, at most {MAX_STRING_BYTES} fit", export.len()));
    }
    if export.contains('\0') {
        return Err("the export name contains a zero byte".into());
    }
    Ok(())
}

fn tcp_address(authority: &str, query: &str) -> Result<Address, String> {
    if authority.contains('@') {
        return Err("a user name needs TLS, which is not supported".into());
    }
    if query.split('&').any(|parameter| parameter.starts_with("socket=")) {
        return Err("a socket path goes with nbd+unix".into());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("a `]` is missing")?;
            (host, after)
        }
        None => match authority.find(':') {
            Some(colon) => authority.split_at(colon),
            None => (authority, ""),
        },
    };
    if host.is_empty() {
        return Err("there is no host name in it".into());
    }
    let port = match port.strip_prefix(':') {
        Some("") => DEFAULT_PORT,
        Some(digits) => digits.parse().map_err(|_| format!("{digits:?} is not a port"))?,
        None if port.is_empty() => DEFAULT_PORT,
        None => return Err(format!("{port:?} after the host name")),
    };
    let host = String::from_utf8(percent_decoded(host)?).map_err(|_| "the host name is not UTF-8")?;
    Ok(Address::Tcp { host, port })
}

fn unix_address(authority: &str, query: &str) -> Result<Address, String> {
    if !authority.is_empty() {
        return Err(format!("{authority:?} stands where nbd+unix has three slashes"));
    }
    let mut sockets = query.split('&').filter_map(|parameter| parameter.strip_prefix("socket="));
    let (Some(socket), None) = (sockets.next(), sockets.next()) else {
        return Err("it needs one `?socket=PATH`".into());
    };
    let path = percent_decoded(socket)?;
    if path.is_empty() || path.contains(&0) {
        return Err("the socket path is empty or contains a zero byte".into());
    }
    Ok(Address::Unix(PathBuf::from(OsString::from_vec(path))))
}

fn percent_decoded(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = text.bytes();
    let mut result = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            result.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(bytes.next()), digit(bytes.next())) else {
            return Err("a `%` is not followed by two hexadecimal digits".into());
        };
        result.push(u8::try_from(high * 16 + low).unwrap_or_default());
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(uri: &str) -> Result<(String, String), String> {
        parse(uri).map(|uri| (uri.address.to_string(), uri.export))
    }

    #[test]
    fn uris_name_an_address_and_an_export() {
        for (uri, address, export) in [
            ("nbd://host", "host:10809", ""),
            ("nbd://host/vda", "host:10809", "vda"),
            ("nbd://host:10810/a/b", "host:10810", "a/b"),
            ("nbd://[::1]:99/x", "[::1]:99", "x"),
            ("NBD+UNIX:///v%20da?socket=/run/a%2Fb.sock", "/run/a/b.sock", "v da"),
            ("nbd+unix:///?socket=rel", "rel", ""),
        ] {
            assert_eq!(read(uri), Ok((address.to_owned(), export.to_owned())), "{uri}");
        }
    }

    #[test]
    fn what_cannot_be_reached_is_refused() {
        for (uri, reason) in [
            ("nbds://host/x", "TLS is not supported"),
            ("nbd+vsock://2/x", "neither nbd nor nbd+unix"),
            ("nbd:unix:/x:exportname=y", "no `://`"),
            ("nbd:///x", "no host name"),
            ("nbd://user@host/x", "user name"),
            ("nbd://host:70000/x", "not a port"),
            ("nbd://[::1/x", "`]` is missing"),
            ("nbd://[::1]x/y", "after the host name"),
            ("nbd+unix:///x", "one `?socket=PATH`"),
            ("nbd+unix:///x?socket=a&socket=b", "one `?socket=PATH`"),
            ("nbd+unix://host/x?socket=a", "three slashes"),
            ("nbd+unix:///x?socket=", "empty"),
            ("nbd://host/x?socket=/s", "nbd+unix"),
            ("nbd://host/%zz", "two hexadecimal digits"),
            ("nbd://host/%ff", "not UTF-8"),
            ("nbd://host/%00", "zero byte"),
            ("nbd://host/x#y", "fragment"),
        ] {
            let error = uri.parse::<NbdUri>().expect_err(uri).to_string();
            assert!(error.contains(reason), "{uri}: {error}");
        }
        assert!(parse(&format!("nbd://host/{}", "x".repeat(4097))).is_err());
    }
}
