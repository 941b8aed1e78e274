//! How many streams each org holds open.

use std::collections::HashMap;
use std::sync::Arc;

use clawhq_api_types::problem::ProblemCode;
use clawhq_domain::ids::OrgId;
use parking_lot::Mutex;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::metrics::{InUse, Kind};
use crate::problem::{Fail, Result};

#[derive(Clone)]
pub struct Streams {
    open: Arc<Mutex<HashMap<OrgId, usize>>>,
    most: usize,
}

/// One open stream.
pub struct Open {
    streams: Streams,
    org: OrgId,
    _measured: InUse,
}

impl Streams {
    pub fn new(most: usize) -> Self {
        Self { open: Arc::default(), most }
    }

    /// Refused with `too_many_streams` when the org holds as many as it may.
    pub fn open(&self, org: OrgId, gauges: &Family<Kind, Gauge>, kind: &'static str) -> Result<Open> {
        let mut open = self.open.lock();
        let count = open.entry(org).or_insert(0);
        if *count >= self.most {
            return Err(Fail::new(ProblemCode::TooManyStreams, format!("This org holds {count} streams open."))
                .hint("Close some: a log or event stream, an exec, a terminal.")
                .retry_after(1_000));
        }
        *count += 1;
        let measured = InUse::new(&gauges.get_or_create(&Kind { kind }));
        Ok(Open { streams: self.clone(), org, _measured: measured })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut open = self.streams.open.lock();
        if let Some(count) = open.get_mut(&self.org) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.org);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_org_has_its_share_and_gives_it_back() {
        let streams = Streams::new(2);
        let gauges = Family::default();
        let (one, other) = (OrgId::from_u128(1), OrgId::from_u128(2));
        let first = streams.open(one, &gauges, "logs").unwrap();
        let _second = streams.open(one, &gauges, "logs").unwrap();
        assert_eq!(streams.open(one, &gauges, "logs").err().unwrap().code(), ProblemCode::TooManyStreams);
        let theirs = streams.open(other, &gauges, "logs").unwrap();
        drop(first);
        assert!(streams.open(one, &gauges, "logs").is_ok());
        drop(theirs);
        assert_eq!(gauges.get_or_create(&Kind { kind: "logs" }).get(), 1);
    }
}
