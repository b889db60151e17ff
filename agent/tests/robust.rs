//! Whatever comes over the sockets, the agent goes on.
#![expect(clippy::unwrap_used, reason = "a test: a failure is a panic")]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use prost::Message;
use support::Agent;
use testudo_agent_protocol::envelope::Request;
use testudo_agent_protocol::{Call, Frame, HealthRequest, Kind, SERVICE, code};

#[test]
fn garbage_closes_its_own_connection_only() {
    need_containers!();
    let agent = Agent::start();
    let mut good = agent.client();
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 64],
        &[0, 0, 0, 0, 0, 0, 0, 1, 9, 9],
    ] {
        for name in ["requests", "streams"] {
            let mut socket = UnixStream::connect(agent.path(name)).unwrap();
            let _ = socket.write_all(bytes);
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let _ = socket.read_to_end(&mut Vec::new());
        }
    }
    good.call(&HealthRequest {}).unwrap();
}

#[test]
fn every_request_without_content_is_answered() {
    need_containers!();
    let agent = Agent::start();
    for name in Call::NAMES {
        // This one waits for events, and there are none; this one ends the agent.
        if ["Events", "DestroySandbox"].contains(name) {
            continue;
        }
        let request = Request {
            service: SERVICE.into(),
            method: (*name).into(),
            ..Request::default()
        };
        let frame = Frame {
            stream: 1,
            kind: Kind::Request,
            payload: request.encode_to_vec(),
        };
        let mut socket = UnixStream::connect(agent.path("requests")).unwrap();
        socket
            .set_read_timeout(Some(std::time::Duration::from_secs(20)))
            .unwrap();
        socket.write_all(&frame.to_bytes()).unwrap();
        let mut header = [0; 10];
        socket.read_exact(&mut header).unwrap();
        assert_eq!(header[8], 2, "{name}");
    }
    agent.call(&HealthRequest {}).unwrap();
}

#[test]
fn many_requests_at_once_are_all_answered() {
    need_containers!();
    let agent = Agent::start();
    let mut client = agent.client();
    let pending: Vec<_> = (0..500)
        .map(|_| client.send(&HealthRequest {}).unwrap())
        .collect();
    for one in pending.into_iter().rev() {
        client.receive(one).unwrap();
    }
    let unknown = Frame {
        stream: 77,
        kind: Kind::Request,
        payload: Request {
            service: "x".into(),
            ..Request::default()
        }
        .encode_to_vec(),
    };
    let mut socket = UnixStream::connect(agent.path("requests")).unwrap();
    socket.write_all(&unknown.to_bytes()).unwrap();
    let mut answer = vec![0; 256];
    let length = socket.read(&mut answer).unwrap();
    let response = testudo_agent_protocol::envelope::Response::decode(&answer[10..length]).unwrap();
    assert_eq!(response.status.unwrap().code, code::UNIMPLEMENTED);
}
