//! The table of holes that others had (`docs/devices/README.md`) names tests: they exist.

use std::fs;
use std::path::Path;

use crate::workspace;

/// The names in the last column of the table's rows.
fn named(page: &str) -> Vec<&str> {
    let rows = page.lines().filter(|line| {
        let first = line.strip_prefix("| ").unwrap_or_default();
        ["CVE-", "ch#", "RUSTSEC-", "hostile "]
            .iter()
            .any(|hole| first.starts_with(hole))
    });
    rows.filter_map(|row| row.trim_end_matches(['|', ' ']).rsplit('|').next())
        .flat_map(|tests| tests.split('`').skip(1).step_by(2))
        .filter(|name| name.contains('_'))
        .collect()
}

fn sources(dir: &Path, text: &mut String) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() && entry.file_name() != "target" {
            sources(&path, text);
        } else if path.extension().is_some_and(|e| e == "rs") {
            text.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_named_test_exists() {
    let root = workspace::root().unwrap();
    let page = fs::read_to_string(root.join("docs/devices/README.md")).unwrap();
    let names = named(&page);
    assert!(names.len() > 20, "the table is read: {names:?}");
    let mut text = String::new();
    for dir in ["base", "devices", "vmm", "tests/vm"] {
        sources(&root.join(dir), &mut text);
    }
    let missing: Vec<_> = names
        .iter()
        .filter(|name| {
            let is_one = [format!("fn {name}("), format!("\"{name}\"")];
            !is_one.iter().any(|it| text.contains(it))
        })
        .collect();
    assert!(missing.is_empty(), "no tests of these names: {missing:?}");
}
