//! The console's built files. A crate of its own, so that a change of the console relinks little.
//!
//! Release builds carry the files; other builds read `web/dist` at run time, so that the console can be rebuilt beside a
//! running server. Without a build of the console there are no files, and the server says so in their place.

use std::borrow::Cow;

#[derive(rust_embed::RustEmbed)]
#[folder = "../../web/dist"]
#[allow_missing = true]
#[exclude = ".vite/*"]
struct Dist;

/// One file.
pub struct File {
    pub bytes: Cow<'static, [u8]>,
    /// SHA-256 of the bytes.
    pub hash: [u8; 32],
}

/// The file at a path relative to the site's root, such as `index.html` or `assets/index-4f9a.js.br`.
pub fn file(path: &str) -> Option<File> {
    // The embedded map knows no other names; a folder on disk does.
    if path.split('/').any(|part| part.is_empty() || part.starts_with('.') || part.contains('\\')) {
        return None;
    }
    Dist::get(path).map(|file| File { hash: file.metadata.sha256_hash(), bytes: file.data })
}

#[cfg(test)]
mod tests {
    #[test]
    fn nothing_outside_the_folder_is_a_file() {
        for path in [
            "../package.json",
            "..",
            "",
            "/etc/passwd",
            "./index.html",
            ".vite/manifest.json",
            "assets/../../package.json",
            "a//b",
        ] {
            assert!(super::file(path).is_none(), "{path}");
        }
    }
}
