//! Who may touch every org's rows is a reviewed list: each place that makes a `SystemScope`, by file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

const CONSTRUCTOR: &str = "SystemScope::for_part(";

fn sources(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() && !name.starts_with('.') && !["target", "node_modules", "data"].contains(&name) {
            sources(&path, found)?;
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
    Ok(())
}

#[test]
fn every_maker_of_a_system_scope_is_listed() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let mut files = Vec::new();
    sources(&root, &mut files)?;
    assert!(files.len() > 20, "the workspace was not found");
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for file in files {
        let count = fs::read_to_string(&file)?.matches(CONSTRUCTOR).count();
        let name = file.strip_prefix(&root)?.display().to_string();
        if count > 0 && name != "crates/store/tests/it/scopes.rs" {
            places.insert(name, count);
        }
    }
    let now: String = places.iter().map(|(name, count)| format!("{name} {count}\n")).collect();
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/system_scopes.txt");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&list, &now)?;
    }
    let listed = fs::read_to_string(&list).context("tests/system_scopes.txt")?;
    assert_eq!(now, listed, "review the new place, then run with UPDATE_EXPECT=1");
    Ok(())
}
