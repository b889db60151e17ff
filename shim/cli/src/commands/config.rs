//! `testudo config`.

use std::fmt::Write;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::{print, say};
use crate::args::{ConfigArgs, ConfigCommand};
use crate::config::{Config, KEYS, Key, Layer, Sources, load, nearest, variable};

pub(super) fn config(args: &ConfigArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        ConfigCommand::Page => print(page().as_bytes())?,
        ConfigCommand::Explain { key, json } => {
            let (config, layers) = load(&Sources::of_process())?;
            let known = |word: &String| {
                KEYS.iter().find(|key| key.name == *word).ok_or_else(|| {
                    let meant = nearest(word)
                        .map_or_else(String::new, |key| format!(", did you mean {key}?"));
                    anyhow::anyhow!(
                        "there is no key {word}{meant}; `testudo config explain` lists all"
                    )
                })
            };
            let keys: Vec<&Key> = match key {
                Some(word) => vec![known(word)?],
                None => KEYS.iter().collect(),
            };
            if *json {
                let all: Vec<Value> = keys
                    .iter()
                    .map(|key| as_json(key, &config, &layers))
                    .collect();
                say(&serde_json::to_string_pretty(&all)?)?;
            } else {
                let all: Vec<String> = keys
                    .iter()
                    .map(|key| as_text(key, &config, &layers))
                    .collect();
                print(all.join("\n").as_bytes())?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn origins(key: &Key, layers: &[Layer]) -> Vec<String> {
    let of_key = layers.iter().filter(|layer| layer.key == key.name);
    of_key.map(|layer| layer.origin.to_string()).collect()
}

fn as_json(key: &Key, config: &Config, layers: &[Layer]) -> Value {
    json!({
        "key": key.name,
        "about": about(key),
        "kind": key.kind,
        "default": key.default,
        "value": config.show(key.name),
        "set_in": origins(key, layers),
        "variable": variable(key.name),
    })
}

fn about(key: &Key) -> String {
    key.doc
        .lines()
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(" ")
        .trim()
        .to_owned()
}

fn as_text(key: &Key, config: &Config, layers: &[Layer]) -> String {
    let origins = origins(key, layers);
    let value = match (config.show(key.name), origins.split_last()) {
        (Some(value), Some((last, []))) => format!("{value}, set in {last}"),
        (Some(value), Some((last, before))) => {
            format!("{value}, set in {last}, over {}", before.join(", "))
        }
        (_, None) => "not set".to_owned(),
        (None, Some((last, _))) => format!("empty, set in {last}"),
    };
    format!(
        "{}\n  {}\n  kind     {}\n  default  {}\n  value    {value}\n  variable {}\n",
        key.name,
        about(key),
        key.kind,
        key.default,
        variable(key.name)
    )
}

/// docs/config.md; a test compares them.
pub(crate) fn page() -> String {
    let mut page = String::from(include_str!("config_head.md"));
    let mut section = "";
    for key in KEYS {
        let (of, name) = key.name.split_once('.').unwrap_or(("", key.name));
        if of != section {
            let _ = write!(
                page,
                "\n## [{of}]\n\n| key | is | default |\n|---|---|---|\n"
            );
            section = of;
        }
        let _ = writeln!(
            page,
            "| `{name}` | {} ({}) | {} |",
            about(key),
            key.kind,
            key.default
        );
    }
    page
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_page_is_of_this_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/config.md");
        let there = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            there == super::page(),
            "make it anew: testudo config page > docs/config.md"
        );
    }
}
