//! The console is built by its own tools; this crate is built again when they have written something else.

fn main() {
    println!("cargo:rerun-if-changed=../../web/dist");
}
