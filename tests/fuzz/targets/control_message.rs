//! Any packet as a message of the control socket, in both directions. What reads must write and
//! read back as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testudo_protocol::control::{Request, ServerMessage};

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = Request::from_packet(data) {
        let packet = request.to_packet().expect("a request that was read");
        assert_eq!(
            Request::from_packet(&packet).expect("what was written"),
            request
        );
    }
    if let Ok(message) = ServerMessage::from_packet(data) {
        let packet = message.to_packet().expect("a message that was read");
        assert_eq!(
            ServerMessage::from_packet(&packet).expect("what was written"),
            message
        );
    }
});
