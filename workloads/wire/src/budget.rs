//! Descriptor budget: how many sockets this process may hold, checked before the first is opened.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a service is going to hold open.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Most connections held by all processes together.
    pub connections: u64,
    /// Descriptors that one connection costs (2 for a relay, 1 for a server).
    pub per_connection: u64,
    /// Descriptors a process needs beside its connections (listeners, pipes, timers, log, admin).
    pub reserve: u64,
}

/// A budget that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Descriptors this process may hold, after the soft limit was raised to the hard one.
    pub descriptors: u64,
    /// Connections one process may hold.
    pub per_process: u64,
    /// Processes that hold `Needs::connections` together.
    pub processes: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BudgetError {
    #[error(
        "{connections} connections need {wanted} descriptors a process over {processes} process(es), but the hard limit is {limit}; \
         allow {needed} processes, fewer connections, or raise the limit (LimitNOFILE=, --ulimit nofile)"
    )]
    TooFew { connections: u64, processes: u64, wanted: u64, limit: u64, needed: u64 },
    #[error("the descriptor limit is {limit}, below the {reserve} this service needs before its first connection")]
    NoRoom { limit: u64, reserve: u64 },
}

/// Raises the soft descriptor limit to the hard one and returns it.
pub fn raise_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    if limit.current.unwrap_or(u64::MAX) < hard {
        // Refused only where a sandbox forbids it; what is read back below is then what holds.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Fits `needs` into `limit` descriptors a process. With `processes = None` as many processes are planned as it takes.
pub fn plan(needs: Needs, limit: u64, processes: Option<u64>) -> Result<Budget, BudgetError> {
    let room = limit.saturating_sub(needs.reserve) / needs.per_connection.max(1);
    if room == 0 {
        return Err(BudgetError::NoRoom { limit, reserve: needs.reserve });
    }
    let needed = needs.connections.div_ceil(room).max(1);
    match processes {
        Some(given) if given < needed => Err(BudgetError::TooFew {
            connections: needs.connections,
            processes: given,
            wanted: needs.connections.div_ceil(given.max(1)) * needs.per_connection + needs.reserve,
            limit,
            needed,
        }),
        given => Ok(Budget { descriptors: limit, per_process: room, processes: given.unwrap_or(needed) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_processes_for_what_one_cannot_hold() {
        let needs = Needs { connections: 40_000, per_connection: 2, reserve: 500 };
        assert_eq!(plan(needs, 20_000, None).unwrap().processes, 5);
        assert_eq!(plan(needs, 200_000, None).unwrap().processes, 1);
        let refused = plan(needs, 20_000, Some(2)).unwrap_err();
        assert_eq!(
            refused,
            BudgetError::TooFew { connections: 40_000, processes: 2, wanted: 40_500, limit: 20_000, needed: 5 }
        );
        assert!(matches!(plan(needs, 400, None), Err(BudgetError::NoRoom { .. })));
    }

    #[test]
    fn raised_limit_is_the_hard_one() {
        let limit = raise_limit();
        assert_eq!(Some(limit), getrlimit(Resource::Nofile).maximum);
    }
}
