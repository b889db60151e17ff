//! The configuration: one typed table, read once by each command.
//!
//! ```text
//!  defaults ◀ /etc/testudo/config.toml ◀ /etc/testudo/config.d/*.toml
//!           ◀ ~/.config/testudo/config.toml ◀ ~/.config/testudo/config.d/*.toml ◀ TESTUDO_… ◀ flags
//! ```
//! What is further right wins. An unknown key, a value of the wrong kind and a key that nothing would
//! come of are errors, wherever they are. Each key is declared once, in [`keys`](mod@keys), with the words
//! that `testudo config explain` and `docs/config.md` show.

mod keys;
mod layers;
mod value;

pub use keys::{Config, KEYS, Key};
pub use layers::{ConfigError, Layer, Origin, Sources, load, nearest, parse, variable};
pub use value::{Setting, Wrong};
