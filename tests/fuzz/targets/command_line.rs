//! Any text as a kernel command line, and any text added to it. Parts are divided by newlines.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testudo_boot::Cmdline;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut parts = text.split('\n');
    let Ok(mut line) = Cmdline::new(parts.next().unwrap_or("")) else {
        return;
    };
    for part in parts {
        let before = line.as_str().to_owned();
        match line.append_default(part) {
            Ok(()) => assert!(line.as_str().len() >= before.len()),
            Err(_) => assert_eq!(line.as_str(), before),
        }
        let _ = line.append(part);
    }
    assert!(line.as_str().len() < 4096);
    assert!(line.as_str().bytes().all(|b| (b' '..=b'~').contains(&b)));
    // What is accepted once is accepted again, as it is.
    let again = Cmdline::new(line.as_str()).expect("a line that was accepted");
    assert_eq!(again.as_str(), line.as_str().trim());
});
