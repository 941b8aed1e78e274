//! Reviewed snapshots: a table is printed, compared with the file checked in, and rewritten on request.

/// Compares with `tests/output/<name>`; `CLAWHQ_UPDATE=1` rewrites it.
#[allow(clippy::disallowed_methods)]
pub fn snapshot(name: &str, text: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/output").join(name);
    if std::env::var_os("CLAWHQ_UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().expect("it has a parent")).expect("the folder can be made");
        std::fs::write(&path, text).expect("the snapshot can be written");
    }
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(known == text, "{name} differs; review it, then run the test with CLAWHQ_UPDATE=1\n\n{text}");
}
