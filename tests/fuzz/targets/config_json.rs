//! Any text as a VM configuration: read, and if it reads, checked.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testudo_vmm::spec::Config;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(config) = Config::from_json(text)
    {
        let _ = config.check();
    }
});
