//! One control client.

use std::io;

use testudo_protocol::{
    Connection, Event, Failure, FailureKind, Outcome, Reply, Request, ServerMessage,
};

/// A client of the control socket.
pub(super) struct Client {
    connection: Connection,
    follows: bool,
    gone: bool,
}

/// The client has closed its end, or does not keep to the protocol's framing.
pub(super) struct Gone;

impl Client {
    pub(super) fn new(connection: Connection) -> Self {
        Self {
            connection,
            follows: false,
            gone: false,
        }
    }

    /// The next request; `None` if there is none, or if what came was answered as malformed.
    /// Descriptors that no verb asks for are closed.
    pub(super) fn request(&mut self) -> Result<Option<Request>, Gone> {
        let received = match self.connection.receive() {
            Ok(received) if received.message.is_empty() => return Err(Gone),
            Ok(received) => received,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                self.malformed("the message is too long or carries too many descriptors");
                return Ok(None);
            }
            Err(_) => return Err(Gone),
        };
        match Request::from_packet(&received.message) {
            Ok(request) => Ok(Some(request)),
            Err(error) => {
                self.malformed(&error.to_string());
                Ok(None)
            }
        }
    }

    fn malformed(&mut self, message: &str) {
        let outcome = Outcome::Failed(Failure {
            kind: FailureKind::Malformed,
            message: message.to_owned(),
        });
        self.reply(Reply { id: 0, outcome });
    }

    /// From now on the client gets events.
    pub(super) fn follow(&mut self) {
        self.follows = true;
    }

    pub(super) fn reply(&mut self, reply: Reply) {
        self.send(&ServerMessage::Reply(reply));
    }

    /// Sends `event` if the client follows.
    pub(super) fn event(&mut self, event: &Event) {
        if self.follows {
            self.send(&ServerMessage::Event(event.clone()));
        }
    }

    /// A client that does not read what it asked for loses its connection, not its neighbours'
    /// time.
    fn send(&mut self, message: &ServerMessage) {
        let sent = message
            .to_packet()
            .map_err(io::Error::other)
            .and_then(|packet| self.connection.send(&packet, &[]));
        if let Err(error) = sent {
            log::debug!("a control client is dropped: {error}");
            self.gone = true;
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }
}
