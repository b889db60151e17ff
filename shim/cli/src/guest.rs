//! Reaching the agent of a pod: requests and streams, through the VMM's vsock socket.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use testudo_agent_protocol::{
    CallError, Client, Preamble, REQUEST_PORT, Rpc, STREAM_PORT, connect_through,
};
use thiserror::Error;

/// The VMM's socket in a pod's runtime folder.
pub const VSOCK: &str = "vsock";

/// The agent cannot be reached, or did not do it.
#[derive(Debug, Error)]
pub enum GuestError {
    /// No connection.
    #[error("cannot reach the agent through {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A request.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Where a pod's guest is.
#[derive(Debug, Clone)]
pub struct Guest {
    socket: PathBuf,
}

impl Guest {
    /// By the pod's runtime folder.
    pub fn of(sockets: &Path) -> Self {
        Self {
            socket: sockets.join(VSOCK),
        }
    }

    fn open(&self, port: u32) -> Result<UnixStream, GuestError> {
        let error = |source| GuestError::Connect {
            path: self.socket.clone(),
            source,
        };
        let mut stream = UnixStream::connect(&self.socket).map_err(error)?;
        connect_through(&mut stream, port).map_err(error)?;
        Ok(stream)
    }

    /// A connection for requests.
    pub fn connect(&self) -> Result<Client<UnixStream>, GuestError> {
        Ok(Client::new(self.open(REQUEST_PORT)?))
    }

    /// One request over a connection of its own.
    pub fn call<R: Rpc>(&self, request: &R) -> Result<R::Response, GuestError> {
        Ok(self.connect()?.call(request)?)
    }

    /// A stream that a request names by this number.
    pub fn stream(&self, number: u64) -> Result<UnixStream, GuestError> {
        let mut stream = self.open(STREAM_PORT)?;
        stream
            .write_all(&Preamble { number }.to_bytes())
            .map_err(|source| GuestError::Connect {
                path: self.socket.clone(),
                source,
            })?;
        Ok(stream)
    }
}

/// Ends what goes to the guest on a stream; what comes from it still does.
pub fn end_of_input(stream: &UnixStream) {
    // If it has gone, it needs no telling.
    let _ = stream.shutdown(Shutdown::Write);
}
