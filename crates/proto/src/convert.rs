//! Wire shapes to and from `domain`. What does not parse is a named field, never a panic.

use std::str::FromStr;

use clawhq_domain::slot::{Exit, Failure, FailureKind, LOG_TAIL_LINES, SlotReport, SlotState, Step};
use clawhq_domain::template::{Probe, Tmpfs, WarmMode};

use crate::v1;

/// A message that does not say what it must.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the field {0} is missing or malformed")]
pub struct Malformed(pub &'static str);

fn id<T: FromStr>(text: &str, field: &'static str) -> Result<T, Malformed> {
    text.parse().map_err(|_| Malformed(field))
}

fn optional_id<T: FromStr>(text: &str, field: &'static str) -> Result<Option<T>, Malformed> {
    if text.is_empty() { Ok(None) } else { id(text, field).map(Some) }
}

fn optional(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl TryFrom<v1::SlotReport> for SlotReport {
    type Error = Malformed;

    fn try_from(wire: v1::SlotReport) -> Result<Self, Malformed> {
        let v1::SlotReport {
            slot_id,
            generation,
            instance_id,
            state,
            run,
            container_id,
            image_digest,
            failure,
            steps,
            at_ms,
        } = wire;
        Ok(Self {
            slot: id(&slot_id, "slot_id")?,
            generation,
            instance: optional_id(&instance_id, "instance_id")?,
            state: SlotState::parse(&state).ok_or(Malformed("state"))?,
            run,
            container: optional(container_id),
            image_digest: optional(image_digest),
            failure: failure.map(Into::into),
            steps: steps.into_iter().map(|step| Step { name: step.name, micros: step.micros }).collect(),
            at: at_ms,
        })
    }
}

impl From<SlotReport> for v1::SlotReport {
    fn from(report: SlotReport) -> Self {
        let SlotReport { slot, generation, instance, state, run, container, image_digest, failure, steps, at } = report;
        Self {
            slot_id: slot.to_string(),
            generation,
            instance_id: instance.map(|id| id.to_string()).unwrap_or_default(),
            state: state.name().to_owned(),
            run,
            container_id: container.unwrap_or_default(),
            image_digest: image_digest.unwrap_or_default(),
            failure: failure.map(Into::into),
            steps: steps.into_iter().map(|step| v1::Step { name: step.name, micros: step.micros }).collect(),
            at_ms: at,
        }
    }
}

impl From<v1::Failure> for Failure {
    fn from(wire: v1::Failure) -> Self {
        use v1::failure::Exit as Wire;
        let v1::Failure { kind, message, exit, mut log_tail } = wire;
        log_tail.truncate(LOG_TAIL_LINES);
        Self {
            // A newer agent may know more kinds than we do.
            kind: FailureKind::parse(&kind).unwrap_or(FailureKind::Internal),
            message,
            exit: exit.map(|exit| match exit {
                Wire::ExitCode(code) => Exit::Code(code),
                Wire::ExitSignal(signal) => Exit::Signal(signal),
                Wire::OutOfMemory(_) => Exit::OutOfMemory,
            }),
            log_tail,
        }
    }
}

impl From<Failure> for v1::Failure {
    fn from(failure: Failure) -> Self {
        use v1::failure::Exit as Wire;
        let Failure { kind, message, exit, log_tail } = failure;
        Self {
            kind: kind.code().to_owned(),
            message,
            exit: exit.map(|exit| match exit {
                Exit::Code(code) => Wire::ExitCode(code),
                Exit::Signal(signal) => Wire::ExitSignal(signal),
                Exit::OutOfMemory => Wire::OutOfMemory(true),
            }),
            log_tail,
        }
    }
}

impl From<Probe> for v1::Probe {
    fn from(probe: Probe) -> Self {
        use v1::probe::{HttpProbe, Kind, Started};
        let kind = match probe {
            Probe::Started => Kind::Started(Started {}),
            Probe::Tcp { port } => Kind::TcpPort(u32::from(port)),
            Probe::Http { port, path, expect } => {
                Kind::Http(HttpProbe { port: u32::from(port), path, expect: expect.unwrap_or_default() })
            }
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::Probe> for Probe {
    type Error = Malformed;

    fn try_from(wire: v1::Probe) -> Result<Self, Malformed> {
        use v1::probe::Kind;
        let port = |port: u32| u16::try_from(port).ok().filter(|port| *port != 0).ok_or(Malformed("probe.port"));
        match wire.kind.ok_or(Malformed("probe.kind"))? {
            Kind::Started(_) => Ok(Self::Started),
            Kind::TcpPort(number) => Ok(Self::Tcp { port: port(number)? }),
            Kind::Http(http) => {
                Ok(Self::Http { port: port(http.port)?, path: http.path, expect: optional(http.expect) })
            }
        }
    }
}

impl From<Tmpfs> for v1::Tmpfs {
    fn from(tmpfs: Tmpfs) -> Self {
        let Tmpfs { path, size_mib, exec } = tmpfs;
        Self { path, size_mib, exec }
    }
}

/// The name a warm mode travels by.
pub fn warm_mode_name(mode: WarmMode) -> &'static str {
    match mode {
        WarmMode::Exec => "exec",
        WarmMode::App => "app",
        WarmMode::Frozen => "frozen",
        WarmMode::None => "none",
    }
}

/// The warm mode of a name; unknown ones are not pooled.
pub fn warm_mode_parse(text: &str) -> WarmMode {
    match text {
        "exec" => WarmMode::Exec,
        "app" => WarmMode::App,
        "frozen" => WarmMode::Frozen,
        _ => WarmMode::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clawhq_domain::ids::{InstanceId, SlotId};

    fn report() -> SlotReport {
        SlotReport {
            slot: SlotId::from_u128(1),
            generation: 3,
            instance: Some(InstanceId::from_u128(2)),
            state: SlotState::Failed,
            run: 2,
            container: Some("abc".to_owned()),
            image_digest: Some("sha256:00".to_owned()),
            failure: Some(Failure {
                kind: FailureKind::Command,
                message: "no such file".to_owned(),
                exit: Some(Exit::Code(127)),
                log_tail: vec!["last".to_owned()],
            }),
            steps: vec![Step { name: "claim".to_owned(), micros: 260 }],
            at: 1_700_000_000_000,
        }
    }

    #[test]
    fn a_report_survives_the_wire() {
        assert_eq!(SlotReport::try_from(v1::SlotReport::from(report())), Ok(report()));
    }

    #[test]
    fn what_is_malformed_is_named() {
        let mut wire = v1::SlotReport::from(report());
        wire.state = "dancing".to_owned();
        assert_eq!(SlotReport::try_from(wire), Err(Malformed("state")));
        let mut wire = v1::SlotReport::from(report());
        wire.slot_id = InstanceId::from_u128(1).to_string();
        assert_eq!(SlotReport::try_from(wire), Err(Malformed("slot_id")));
        let probe = v1::Probe { kind: Some(v1::probe::Kind::TcpPort(70_000)) };
        assert_eq!(Probe::try_from(probe), Err(Malformed("probe.port")));
    }
}
