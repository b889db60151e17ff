//! Any bytes as a manifest, an index, a configuration; any text as a reference.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testudo_image::manifest::Document;
use testudo_image::{ImageConfig, Platform, Reference};

fuzz_target!(|data: &[u8]| {
    if let Ok(Document::Index(index)) = Document::parse(data) {
        let _ = index.select(&Platform::host());
    }
    let _ = ImageConfig::parse(data);
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(reference) = text.parse::<Reference>()
    {
        // What was understood is written so that it is understood in the same way.
        let again = reference.to_string().parse();
        assert_eq!(again, Ok(reference));
    }
});
