//! Pulls an image into a store and says how long that took: `pull STORE IMAGE`.
#![expect(clippy::print_stdout, reason = "that is what it is for")]

use std::error::Error;
use std::time::Instant;

use testudo_image::{Event, Options, Source, Store};

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [root, word] = words.as_slice() else {
        return Err("usage: pull STORE IMAGE".into());
    };
    let begun = Instant::now();
    let store = Store::open(root.as_ref())?;
    let mut unpacked = std::collections::BTreeMap::new();
    let image = store.pull(&Source::parse(word)?, &Options::default(), &mut |event| {
        if let Event::Unpacking { layer, bytes, .. } = event {
            unpacked.insert(layer, bytes);
        }
    })?;
    let bytes: u64 = unpacked.values().sum();
    println!("{}", image.rootfs.path().display());
    println!(
        "{bytes} bytes unpacked, {} in the image, {:?}",
        image.size,
        begun.elapsed()
    );
    Ok(())
}
