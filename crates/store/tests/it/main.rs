//! The store on real PostgreSQL, one database for each test.

mod accounts;
mod deploy;
mod jobs;
mod lifecycle;
mod migrations;
mod scopes;
mod tenancy;
