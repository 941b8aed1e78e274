//! The hub as a whole: one program of tests, so that what they share is compiled once.

mod clients;
mod common;
mod durable;
mod hostile;
mod operations;
mod peers;
mod tunnels;
