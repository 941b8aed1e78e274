//! What must outlive this process: which slot is which container and whose, the reports nobody has acknowledged, the
//! number of dials, the lease.
//!
//! One small file a slot, replaced by rename; reports in one file that is only appended to. They are not synced to the
//! disk: what survives is `kill -9` of this process, and after a crash of the host no process is left that they would be
//! needed for. The installation's id is: stopped containers carry it. Processes are written without arguments, environment and files: secrets are never on disk.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clawhq_domain::ids::SlotId;
use clawhq_proto::v1;
use prost::Message;

/// Unacknowledged reports kept; beyond them an older one of the same slot is dropped first.
const REPORTS_MAX: usize = 10_000;
/// The report file is rewritten when it is longer than this and nothing in it is needed.
const COMPACT_BYTES: u64 = 256 << 10;

/// What is kept of a slot.
#[derive(Clone, PartialEq, Message)]
pub struct SlotRecord {
    /// Without secrets.
    #[prost(message, optional, tag = "1")]
    pub desired: Option<v1::SlotDesired>,
    #[prost(string, tag = "2")]
    pub container_id: String,
    #[prost(uint32, optional, tag = "3")]
    pub piece: Option<u32>,
    #[prost(uint32, tag = "4")]
    pub run: u32,
    #[prost(uint32, tag = "5")]
    pub restarted: u32,
    /// The instance whose claim was given to it; empty: none.
    #[prost(string, tag = "6")]
    pub assigned: String,
    #[prost(bool, tag = "7")]
    pub ready: bool,
    #[prost(uint32, tag = "8")]
    pub failures: u32,
    #[prost(uint32, optional, tag = "9")]
    pub gave_up: Option<u32>,
    /// On the clock that runs through suspends.
    #[prost(int64, tag = "10")]
    pub started_at: i64,
    #[prost(string, tag = "11")]
    pub image_digest: String,
    #[prost(string, repeated, tag = "12")]
    pub image_argv: Vec<String>,
    #[prost(string, tag = "13")]
    pub volume: String,
    #[prost(uint64, tag = "14")]
    pub delivered: u64,
    /// The last run whose end was counted.
    #[prost(uint32, tag = "15")]
    pub ended: u32,
    /// On the same clock; 0: an older agent's record.
    #[prost(int64, tag = "16")]
    pub ready_at: i64,
}

/// When the lease ends, on the clock that runs through suspends, and the boot that clock belongs to.
#[derive(Clone, PartialEq, Message)]
pub struct LeaseRecord {
    #[prost(string, tag = "1")]
    pub boot: String,
    /// 0: it does not end.
    #[prost(int64, tag = "2")]
    pub until_boot_ms: i64,
}

pub struct Ledger {
    slots: PathBuf,
    small: PathBuf,
    /// Held for as long as we run.
    _lock: nix::fcntl::Flock<File>,
    /// Random, made once: what our containers are labelled with.
    pub installation: String,
}

/// What the containers of the ledger in `dir` are labelled with; none were made where there is none.
pub fn installation(dir: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(dir.join("installation")) {
        Ok(text) => Ok(Some(text).filter(|text| is_one(text))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_one(installation: &str) -> bool {
    installation.len() == 16 && installation.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Ledger {
    /// Errors: the directory cannot be written, or another node agent has it.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let slots = dir.join("slots");
        fs::create_dir_all(&slots)?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(dir.join("lock"))?;
        let lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| anyhow::anyhow!("another node agent uses {}: {error}", dir.display()))?;
        let mut ledger = Self { slots, small: dir.to_owned(), _lock: lock, installation: String::new() };
        let kept = ledger.read("installation")?.map(|bytes| String::from_utf8(bytes).unwrap_or_default());
        if kept.as_ref().is_some_and(|text| !is_one(text)) {
            tracing::error!(dir = %dir.display(), "the installation's id is damaged: containers made under it are not ours any more");
        }
        ledger.installation = match kept.filter(|text| is_one(text)) {
            Some(known) => known,
            None => {
                let fresh = hex::encode(rand::random::<[u8; 8]>());
                replace_synced(&dir.join("installation"), fresh.as_bytes())?;
                fresh
            }
        };
        Ok(ledger)
    }

    /// Every slot that was kept. One that cannot be read is left out: its container's labels say what it was.
    pub fn load(&self) -> io::Result<Vec<(SlotId, SlotRecord)>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.slots)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Ok(slot) = name.parse::<SlotId>() else {
                // A draft that was not renamed.
                fs::remove_file(&path)?;
                continue;
            };
            match SlotRecord::decode(&fs::read(&path)?[..]) {
                Ok(record) => all.push((slot, record)),
                Err(error) => tracing::warn!(%slot, %error, "a ledger entry cannot be read and is left out"),
            }
        }
        Ok(all)
    }

    pub fn save(&self, slot: SlotId, record: &[u8]) -> io::Result<()> {
        replace(&self.slots.join(slot.to_string()), record)
    }

    pub fn remove(&self, slot: SlotId) -> io::Result<()> {
        match fs::remove_file(self.slots.join(slot.to_string())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The number of this dial: one more than the last.
    pub fn dial(&self) -> io::Result<u64> {
        let last = self.read("dial")?.and_then(|bytes| String::from_utf8(bytes).ok()?.parse().ok()).unwrap_or(0_u64);
        let next = last + 1;
        self.write("dial", next.to_string().as_bytes())?;
        Ok(next)
    }

    pub fn lease(&self) -> Option<LeaseRecord> {
        self.read("lease").ok().flatten().and_then(|bytes| LeaseRecord::decode(&bytes[..]).ok())
    }

    pub fn save_lease(&self, lease: &LeaseRecord) -> io::Result<()> {
        self.write("lease", &lease.encode_to_vec())
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.small.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        replace(&self.small.join(name), bytes)
    }
}

/// Readers see the old content or the new.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("draft");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
    file.write_all(bytes)?;
    fs::rename(&draft, path)
}

/// [`replace`], and on the disk when it returns: for what a crash of the whole host must not take.
pub fn replace_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("draft");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

/// A desired slot as it may lie on the disk.
pub fn redacted(desired: &v1::SlotDesired) -> v1::SlotDesired {
    let process = |process: &v1::Process| v1::Process {
        argv: Vec::new(),
        env: Default::default(),
        working_dir: process.working_dir.clone(),
        files: Vec::new(),
        probe: process.probe.clone(),
        warm_up: Vec::new(),
        start_deadline_ms: process.start_deadline_ms,
        stop_deadline_ms: process.stop_deadline_ms,
    };
    v1::SlotDesired {
        slot_id: desired.slot_id.clone(),
        generation: desired.generation,
        present: desired.present,
        spec: desired
            .spec
            .as_ref()
            .map(|spec| v1::SlotSpec { pool_process: spec.pool_process.as_ref().map(process), ..bare(spec) }),
        claim: desired.claim.as_ref().map(|claim| v1::Claim {
            instance_id: claim.instance_id.clone(),
            org_id: claim.org_id.clone(),
            workload_id: claim.workload_id.clone(),
            workload_name: claim.workload_name.clone(),
            process: claim.process.as_ref().map(process),
            restart: claim.restart,
            single_writer: claim.single_writer,
            ports: claim.ports.clone(),
            reload_signal: claim.reload_signal,
        }),
    }
}

/// Everything of a spec but the process: field by field, so that a new one is a decision.
fn bare(spec: &v1::SlotSpec) -> v1::SlotSpec {
    v1::SlotSpec {
        image: spec.image.clone(),
        image_digest: spec.image_digest.clone(),
        memory_mib: spec.memory_mib,
        memory_burst_mib: spec.memory_burst_mib,
        cpu_shares: spec.cpu_shares,
        cpu_millis: spec.cpu_millis,
        pids: spec.pids,
        uid: spec.uid,
        gid: spec.gid,
        tmpfs: spec.tmpfs.clone(),
        volume: spec.volume.clone(),
        hostname: spec.hostname.clone(),
        warm_mode: spec.warm_mode.clone(),
        pool_process: None,
        template: spec.template.clone(),
        tier: spec.tier.clone(),
    }
}

// ------------------------------------------------------------------------------------------------ reports

/// Reports until they are acknowledged, in the order of their indexes.
pub struct Spool {
    path: PathBuf,
    file: File,
    bytes: u64,
    last: u64,
    pending: VecDeque<v1::Report>,
    /// Up to which index the file says that reports are acknowledged.
    acked: u64,
}

/// In place of a record's length: what follows is an index, up to which all is acknowledged.
const ACK: u32 = u32::MAX;

impl Spool {
    /// Reads what is there; a record that was cut short ends it.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(&path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        // Eight bytes: the highest index before the first record.
        let mut last = match bytes.first_chunk::<8>() {
            Some(head) => u64::from_le_bytes(*head),
            None => {
                file.rewind()?;
                file.set_len(0)?;
                file.write_all(&[0; 8])?;
                bytes = vec![0; 8];
                0
            }
        };
        let (mut pending, mut acked, mut good) = (VecDeque::<v1::Report>::new(), last, 8);
        while let Some(head) = bytes[good..].first_chunk::<4>() {
            let length = u32::from_le_bytes(*head);
            if length == ACK {
                let Some(index) = bytes[good + 4..].first_chunk::<8>() else { break };
                acked = acked.max(u64::from_le_bytes(*index));
                good += 12;
                continue;
            }
            let end = (good + 4).saturating_add(length as usize);
            let Some(body) = bytes.get(good + 4..end) else { break };
            let Ok(report) = v1::Report::decode(body) else { break };
            last = last.max(report.index);
            pending.push_back(report);
            good = end;
        }
        pending.retain(|report| report.index > acked);
        file.set_len(good as u64)?;
        file.seek(io::SeekFrom::End(0))?;
        Ok(Self { path, file, bytes: good as u64, last, pending, acked })
    }

    pub fn last_index(&self) -> u64 {
        self.last
    }

    /// Gives the next index and keeps the report. A disk that cannot take it does not stop it from being sent.
    pub fn push(&mut self, slot: v1::SlotReport) -> v1::Report {
        self.last += 1;
        let report = v1::Report { index: self.last, slot: Some(slot) };
        // Its texts are bounded where they are made, far below what a length can say.
        let mut record = u32::try_from(report.encoded_len()).unwrap_or(ACK).to_le_bytes().to_vec();
        report.encode(&mut record).expect("a vector grows");
        self.append(&record);
        self.pending.push_back(report.clone());
        if self.pending.len() > REPORTS_MAX {
            self.supersede();
        }
        report
    }

    fn append(&mut self, record: &[u8]) {
        match self.file.write_all(record) {
            Ok(()) => self.bytes += record.len() as u64,
            Err(error) => {
                tracing::error!(%error, "a report could not be kept on disk");
                // A torn record in the middle would hide the next ones.
                let _ = self.file.set_len(self.bytes).and_then(|()| self.file.seek(io::SeekFrom::End(0)).map(drop));
            }
        }
    }

    /// Drops the oldest report of a slot that has a later one, or else the oldest.
    fn supersede(&mut self) {
        let slot = |report: &v1::Report| report.slot.as_ref().map(|slot| slot.slot_id.clone()).unwrap_or_default();
        let mut later = std::collections::HashSet::new();
        let mut drop = 0;
        for (at, report) in self.pending.iter().enumerate().rev() {
            if !later.insert(slot(report)) {
                drop = at;
            }
        }
        self.pending.remove(drop);
    }

    /// Everything up to and with `index` is safe elsewhere, and is not told again by a later run of ours.
    pub fn ack(&mut self, index: u64) {
        while self.pending.front().is_some_and(|report| report.index <= index) {
            self.pending.pop_front();
        }
        let index = index.min(self.last);
        if index <= self.acked {
            return;
        }
        self.acked = index;
        let mut record = ACK.to_le_bytes().to_vec();
        record.extend_from_slice(&index.to_le_bytes());
        self.append(&record);
        if self.pending.is_empty()
            && self.bytes > COMPACT_BYTES
            && let Err(error) = self.compact()
        {
            tracing::warn!(%error, "the report file could not be rewritten");
        }
    }

    fn compact(&mut self) -> io::Result<()> {
        replace(&self.path, &self.last.to_le_bytes())?;
        self.file = OpenOptions::new().append(true).open(&self.path)?;
        (self.bytes, self.acked) = (8, self.last);
        Ok(())
    }

    pub fn pending(&self) -> impl Iterator<Item = &v1::Report> {
        self.pending.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desired() -> v1::SlotDesired {
        let process = v1::Process {
            argv: vec!["/bin/agent".into(), "--key=HUSH".into()],
            env: [("KEY".to_owned(), "HUSH".to_owned())].into(),
            working_dir: "/w".into(),
            files: vec![v1::File { path: "/run/k".into(), content: b"HUSH".to_vec(), ..v1::File::default() }],
            probe: Some(v1::Probe { kind: Some(v1::probe::Kind::TcpPort(80)) }),
            start_deadline_ms: 1,
            stop_deadline_ms: 2,
            warm_up: vec![v1::WarmUp { body: "HUSH".into(), ..v1::WarmUp::default() }],
        };
        v1::SlotDesired {
            slot_id: SlotId::from_u128(1).to_string(),
            generation: 4,
            present: true,
            spec: Some(v1::SlotSpec { pool_process: Some(process.clone()), uid: 9, ..v1::SlotSpec::default() }),
            claim: Some(v1::Claim { process: Some(process), ports: vec![80], ..v1::Claim::default() }),
        }
    }

    #[test]
    fn no_secret_is_written() {
        let bytes = redacted(&desired()).encode_to_vec();
        assert!(!bytes.windows(4).any(|part| part == b"HUSH"));
        let back = v1::SlotDesired::decode(&bytes[..]).unwrap();
        assert_eq!(back.spec.unwrap().uid, 9);
        let process = back.claim.unwrap().process.unwrap();
        assert_eq!((process.stop_deadline_ms, process.working_dir.as_str()), (2, "/w"));
        assert!(process.probe.is_some());
    }

    #[test]
    fn slots_survive_and_drafts_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        assert!(Ledger::open(dir.path()).is_err(), "two agents in one directory");
        let slot = SlotId::from_u128(5);
        let record = SlotRecord { desired: Some(redacted(&desired())), run: 3, ..SlotRecord::default() };
        ledger.save(slot, &record.encode_to_vec()).unwrap();
        fs::write(dir.path().join("slots").join(format!("{slot}.draft")), "half").unwrap();
        fs::write(dir.path().join("slots").join(SlotId::from_u128(6).to_string()), [0xff; 9]).unwrap();
        let installation = ledger.installation.clone();
        assert_eq!((ledger.dial().unwrap(), ledger.dial().unwrap()), (1, 2));
        drop(ledger);
        let ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(ledger.load().unwrap(), [(slot, record)]);
        assert_eq!((ledger.dial().unwrap(), &ledger.installation), (3, &installation));
        assert_eq!(super::installation(dir.path()).unwrap(), Some(installation));
        ledger.remove(slot).unwrap();
        ledger.remove(slot).unwrap();
        assert_eq!(ledger.load().unwrap(), []);
    }

    #[test]
    fn a_damaged_installation_id_is_replaced_and_never_empty() {
        let dir = tempfile::tempdir().unwrap();
        for damaged in [&b""[..], b"short", &[0xff; 16], b"../../etc/passwd"] {
            fs::write(dir.path().join("installation"), damaged).unwrap();
            let ledger = Ledger::open(dir.path()).unwrap();
            assert_eq!(ledger.installation.len(), 16, "{damaged:?}");
            assert_eq!(fs::read(dir.path().join("installation")).unwrap(), ledger.installation.as_bytes());
        }
    }

    #[test]
    fn reports_keep_their_index_until_acknowledged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reports");
        let report = |n: u128| v1::SlotReport { slot_id: SlotId::from_u128(n).to_string(), ..Default::default() };
        let mut spool = Spool::open(path.clone()).unwrap();
        for n in 1..=3 {
            assert_eq!(spool.push(report(n)).index, n as u64);
        }
        drop(spool);
        // Cut the last record short, as a kill in the middle of a write would.
        let length = fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
        let mut spool = Spool::open(path.clone()).unwrap();
        assert_eq!(spool.pending().map(|report| report.index).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(spool.push(report(4)).index, 3);
        spool.ack(3);
        assert_eq!(spool.pending().count(), 0);
        spool.compact().unwrap();
        spool.push(report(5));
        drop(spool);
        let spool = Spool::open(path).unwrap();
        assert_eq!((spool.last_index(), spool.pending().count()), (4, 1));
    }

    #[test]
    fn what_was_acknowledged_is_not_told_again_by_a_later_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reports");
        let indexes = |spool: &Spool| spool.pending().map(|report| report.index).collect::<Vec<_>>();
        let mut spool = Spool::open(path.clone()).unwrap();
        (0..4).for_each(|_| drop(spool.push(v1::SlotReport::default())));
        spool.ack(2);
        spool.ack(1);
        spool.push(v1::SlotReport::default());
        drop(spool);
        let mut spool = Spool::open(path.clone()).unwrap();
        assert_eq!((indexes(&spool), spool.last_index()), (vec![3, 4, 5], 5));
        // More than was ever given, as an answer to another installation's: what comes next still counts.
        spool.ack(99);
        assert_eq!(spool.push(v1::SlotReport::default()).index, 6);
        drop(spool);
        // A kill in the middle of writing the acknowledgement costs a repetition, never a report.
        let mut spool = Spool::open(path.clone()).unwrap();
        assert_eq!(indexes(&spool), [6]);
        spool.ack(6);
        drop(spool);
        let length = fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
        let mut spool = Spool::open(path.clone()).unwrap();
        assert_eq!(indexes(&spool), [6]);
        assert_eq!(spool.push(v1::SlotReport::default()).index, 7);
        spool.compact().unwrap();
        drop(spool);
        assert_eq!(Spool::open(path).unwrap().last_index(), 7);
    }

    #[test]
    fn a_full_spool_drops_what_a_later_report_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool::open(dir.path().join("reports")).unwrap();
        spool.push(v1::SlotReport { slot_id: "quiet".into(), ..Default::default() });
        for _ in 0..REPORTS_MAX + 5 {
            spool.push(v1::SlotReport { slot_id: "chatty".into(), ..Default::default() });
        }
        assert_eq!(spool.pending().count(), REPORTS_MAX);
        assert_eq!(spool.pending().next().unwrap().index, 1, "the only report of a slot is kept");
    }
}
