//! Bytes of processes: complete, in order with their ends, however fast anybody reads.
#![expect(clippy::unwrap_used, reason = "a test: a failure is a panic")]

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use support::{Agent, number, process, shell};
use testudo_agent_protocol::{
    CloseStdinRequest, CreateContainerRequest, ExecProcessRequest, Exit, MetricsRequest, Process,
    ProcessId, ResizeTtyRequest, SignalProcessRequest, StartContainerRequest, Stdio, TtySize,
    WaitProcessRequest,
};

fn idle(agent: &Agent) {
    let mut client = agent.client();
    client
        .call(&CreateContainerRequest {
            id: "box".into(),
            spec: Some(shell("exec sleep 1000")),
            ..CreateContainerRequest::default()
        })
        .unwrap();
    client
        .call(&StartContainerRequest { id: "box".into() })
        .unwrap();
}

fn exec(agent: &Agent, name: &str, process: Process, stdio: Stdio) -> ProcessId {
    let id = ProcessId {
        container: "box".into(),
        exec: name.into(),
    };
    agent
        .call(&ExecProcessRequest {
            id: Some(id.clone()),
            process: Some(process),
            stdio: Some(stdio),
        })
        .unwrap();
    id
}

fn wait(agent: &Agent, id: &ProcessId) -> Exit {
    agent
        .call(&WaitProcessRequest {
            id: Some(id.clone()),
        })
        .unwrap()
        .exit
        .unwrap()
}

/// A sequence that shows any byte lost, doubled or moved.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn much_through_cat_comes_back_as_it_went() {
    need_containers!();
    let agent = Agent::start().with_root();
    idle(&agent);
    let bytes = pattern(64 << 20);
    let one = number();
    let stdio = Stdio {
        stdin: one,
        stdout: one,
        stderr: 0,
    };
    let id = exec(&agent, "cat", process(&["/bin/cat"]), stdio);
    let stream = agent.stream(one);
    let mut writer = stream.try_clone().unwrap();
    let begun = Instant::now();
    let sent = bytes.clone();
    let sender = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        // The half that is done ends; the other goes on.
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    { stream }.read_to_end(&mut back).unwrap();
    sender.join().unwrap();
    eprintln!(
        "{} MB/s both ways",
        64_000_000 * 1000 / begun.elapsed().as_micros().max(1) / 1000
    );
    assert!(back == bytes, "{} of {} bytes", back.len(), bytes.len());
    let exit = wait(&agent, &id);
    assert_eq!((exit.code, exit.stdout_bytes), (0, 64 << 20));
}

#[test]
fn a_slow_reader_holds_up_the_process_and_nobody_else() {
    need_containers!();
    let agent = Agent::start().with_root();
    idle(&agent);
    let slow = number();
    let stdio = Stdio {
        stdout: slow,
        ..Stdio::default()
    };
    let id = exec(
        &agent,
        "yes",
        process(&["/bin/sh", "-c", "yes | head -c 30000000"]),
        stdio,
    );
    let mut stream = agent.stream(slow);
    std::thread::sleep(Duration::from_millis(300));
    // Others go on, and the agent has not piled anything up.
    let (_, out, _) = agent
        .exec("box", "other", process(&["/bin/echo", "hello"]), b"")
        .unwrap();
    assert_eq!(out, "hello\n");
    let metrics = agent.call(&MetricsRequest {}).unwrap().values;
    assert!(metrics["testudo_agent_rss_bytes"] < 16e6, "{metrics:?}");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 30_000_000);
    assert_eq!(wait(&agent, &id).stdout_bytes, 30_000_000);
}

#[test]
fn last_words_are_counted_and_children_left_behind_hold_up_nobody() {
    need_containers!();
    let agent = Agent::start().with_root();
    idle(&agent);
    let out = number();
    let stdio = Stdio {
        stdout: out,
        ..Stdio::default()
    };
    let script = "(sleep 30; echo late) & head -c 50000 /dev/zero; exit 5";
    let id = exec(&agent, "sh", process(&["/bin/sh", "-c", script]), stdio);
    // Nobody has connected yet: the pipe holds what it can, and the process waits with the rest.
    let mut stream = agent.stream(out);
    let exit = wait(&agent, &id);
    assert_eq!((exit.code, exit.stdout_bytes), (5, 50_000));
    let mut words = vec![0; 50_000];
    stream.read_exact(&mut words).unwrap();
    // The stream itself ends only with the child.
    stream
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    assert!(stream.read(&mut words).is_err());
}

#[test]
fn a_reader_that_leaves_is_a_broken_pipe() {
    need_containers!();
    let agent = Agent::start().with_root();
    idle(&agent);
    let out = number();
    let stdio = Stdio {
        stdout: out,
        ..Stdio::default()
    };
    let id = exec(&agent, "yes", process(&["/usr/bin/yes"]), stdio);
    drop(agent.stream(out));
    assert_eq!(wait(&agent, &id).signal, 13);
}

#[test]
fn stdin_can_be_closed_from_here() {
    need_containers!();
    let agent = Agent::start().with_root();
    idle(&agent);
    let stdio = Stdio {
        stdin: number(),
        ..Stdio::default()
    };
    let id = exec(&agent, "cat", process(&["/bin/cat"]), stdio);
    let _held = agent.stream(stdio.stdin);
    agent
        .call(&CloseStdinRequest {
            id: Some(id.clone()),
        })
        .unwrap();
    assert_eq!(wait(&agent, &id).code, 0);
    // Also when its stream never came.
    let stdio = Stdio {
        stdin: number(),
        ..Stdio::default()
    };
    let id = exec(&agent, "cat2", process(&["/bin/cat"]), stdio);
    agent
        .call(&CloseStdinRequest {
            id: Some(id.clone()),
        })
        .unwrap();
    assert_eq!(wait(&agent, &id).code, 0);
}

#[test]
fn a_terminal_is_one() {
    need_containers!();
    let agent = Agent::start().with_root();
    idle(&agent);
    let one = number();
    let stdio = Stdio {
        stdin: one,
        stdout: one,
        stderr: 0,
    };
    let mut shell = process(&[
        "/bin/sh",
        "-c",
        "tty; stty size; read line; stty size; echo got $line",
    ]);
    shell.terminal = true;
    shell.console_size = Some(TtySize {
        rows: 24,
        columns: 80,
    });
    let id = exec(&agent, "sh", shell, stdio);
    let mut stream = agent.stream(one);
    read_until(&mut stream, "24 80\r\n");
    let size = Some(TtySize {
        rows: 50,
        columns: 132,
    });
    agent
        .call(&ResizeTtyRequest {
            id: Some(id.clone()),
            size,
        })
        .unwrap();
    stream.write_all(b"words\n").unwrap();
    let rest = read_until(&mut stream, "got words\r\n");
    assert!(rest.contains("50 132"), "{rest}");
    assert_eq!(wait(&agent, &id).code, 0);
    let mut end = String::new();
    stream.read_to_string(&mut end).unwrap();
    assert_eq!(end, "");
}

#[test]
fn a_containers_terminal_is_its_console() {
    need_containers!();
    let agent = Agent::start().with_root();
    let one = number();
    let mut spec = shell(
        "trap 'exit 130' INT; tty; test -c /dev/console && echo console > /dev/console; while :; do sleep 0.1; done",
    );
    spec.process.as_mut().unwrap().terminal = true;
    let mut client = agent.client();
    client
        .call(&CreateContainerRequest {
            id: "box".into(),
            spec: Some(spec),
            stdio: Some(Stdio {
                stdin: one,
                stdout: one,
                stderr: 0,
            }),
            ..CreateContainerRequest::default()
        })
        .unwrap();
    client
        .call(&StartContainerRequest { id: "box".into() })
        .unwrap();
    let mut stream = agent.stream(one);
    read_until(&mut stream, "/dev/pts/0\r\nconsole\r\n");
    // The interrupt character is the terminal's business.
    stream.write_all(&[3]).unwrap();
    let id = ProcessId {
        container: "box".into(),
        exec: String::new(),
    };
    assert_eq!(
        client
            .call(&WaitProcessRequest { id: Some(id) })
            .unwrap()
            .exit
            .unwrap()
            .code,
        130
    );
}

fn read_until(stream: &mut UnixStream, end: &str) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with(end) {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "{text}");
        text.push(char::from(byte[0]));
    }
    text
}

#[test]
fn a_thousand_execs_leave_nothing() {
    need_containers!();
    let agent = Agent::start().with_root();
    idle(&agent);
    let run = |n: usize| {
        let (exit, out, _) = agent
            .exec(
                "box",
                &format!("e{n}"),
                process(&["/bin/echo", "hello"]),
                b"",
            )
            .unwrap();
        assert_eq!((exit.code, out.as_str()), (0, "hello\n"));
    };
    // Events are kept up to a bound: it is reached.
    (0..600).for_each(run);
    std::thread::sleep(Duration::from_millis(100));
    let before = agent.call(&MetricsRequest {}).unwrap().values;
    let begun = Instant::now();
    (600..1600).for_each(run);
    eprintln!("{} µs for each exec", begun.elapsed().as_micros() / 1000);
    // The last job's thread may be on its way out.
    std::thread::sleep(Duration::from_millis(100));
    let after = agent.call(&MetricsRequest {}).unwrap().values;
    for name in ["fds", "threads", "relays", "parked_streams", "processes"] {
        let name = format!("testudo_agent_{name}");
        assert_eq!(before[&name], after[&name], "{name}");
    }
    let growth = after["testudo_agent_rss_bytes"] - before["testudo_agent_rss_bytes"];
    eprintln!(
        "RSS {}, grown by {growth}",
        after["testudo_agent_rss_bytes"]
    );
    assert!(growth < 300_000.0, "{growth}");
}

#[test]
fn signals_to_one_and_to_all() {
    need_containers!();
    let agent = Agent::start().with_root();
    let script = "trap 'echo first; exit 1' USR1; sleep 100 & wait";
    let mut client = agent.client();
    client
        .call(&CreateContainerRequest {
            id: "box".into(),
            spec: Some(shell(script)),
            ..CreateContainerRequest::default()
        })
        .unwrap();
    client
        .call(&StartContainerRequest { id: "box".into() })
        .unwrap();
    let stdio = Stdio::default();
    let other = "trap 'exit 2' USR1; while :; do sleep 0.01; done";
    let id = exec(&agent, "other", process(&["/bin/sh", "-c", other]), stdio);
    // Both have set their traps.
    std::thread::sleep(Duration::from_millis(300));
    let init = ProcessId {
        container: "box".into(),
        exec: String::new(),
    };
    let signal = |id: &ProcessId, all| SignalProcessRequest {
        id: Some(id.clone()),
        signal: 10,
        all,
    };
    let pending = client
        .send(&WaitProcessRequest {
            id: Some(id.clone()),
        })
        .unwrap();
    // `all` is what is said, not what is guessed: the other process hears it too.
    agent.call(&signal(&init, true)).unwrap();
    let exit = client.receive(pending).unwrap().exit.unwrap();
    assert!(exit.code == 2 || exit.signal == 9, "{exit:?}");
    assert_eq!(wait(&agent, &init).code, 1);
}
