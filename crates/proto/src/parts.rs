//! The whole desired set of a node, in frames that each fit whatever the node holds.

use prost::Message as _;

use crate::FRAME_BYTES_MAX;
use crate::v1::{self, down::Frame};

/// Slots are gathered into frames of about this size; a larger one travels alone.
const PART_BYTES: usize = 1024 * 1024;
/// No slot may be larger: what the config of a workload may hold stays well below.
const SLOT_BYTES_MAX: usize = FRAME_BYTES_MAX - 64 * 1024;

/// Parts, and the frame that closes the set. The ids of slots that no frame can carry are returned as well: they are
/// mentioned without their content, so that nobody takes them for gone.
pub fn whole_set(slots: Vec<v1::SlotDesired>, removed_volumes: Vec<String>) -> (Vec<Frame>, Vec<String>) {
    let (mut frames, mut too_large) = (Vec::new(), Vec::new());
    let (mut part, mut bytes) = (Vec::new(), 0);
    for mut slot in slots {
        let mut length = slot.encoded_len();
        if length > SLOT_BYTES_MAX {
            too_large.push(slot.slot_id.clone());
            slot = v1::SlotDesired { spec: None, claim: None, ..slot };
            length = slot.encoded_len();
        }
        if bytes + length > PART_BYTES && !part.is_empty() {
            frames.push(Frame::DesiredPart(v1::DesiredPart { slots: std::mem::take(&mut part) }));
            bytes = 0;
        }
        bytes += length;
        part.push(slot);
    }
    if bytes > PART_BYTES {
        frames.push(Frame::DesiredPart(v1::DesiredPart { slots: std::mem::take(&mut part) }));
    }
    frames.push(Frame::Full(v1::DesiredSet { slots: part, removed_volumes }));
    (frames, too_large)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clawhq_domain::ids::SlotId;

    fn slot(number: u128, bytes: usize) -> v1::SlotDesired {
        let file = v1::File { path: "/f".to_owned(), content: vec![b'x'; bytes], ..v1::File::default() };
        let process = v1::Process { files: vec![file], ..v1::Process::default() };
        v1::SlotDesired {
            slot_id: SlotId::from_u128(number).to_string(),
            generation: 1,
            present: true,
            spec: Some(v1::SlotSpec::default()),
            claim: Some(v1::Claim { process: Some(process), ..v1::Claim::default() }),
        }
    }

    fn slots_of(frame: &Frame) -> &[v1::SlotDesired] {
        match frame {
            Frame::DesiredPart(part) => &part.slots,
            Frame::Full(set) => &set.slots,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_frame_fits_and_nothing_is_lost() {
        // More than any frame holds, in slots of every size that a tenant may ask for.
        let sizes = [0, 100, 1 << 20, 300_000, 6 << 20, 1 << 20, 1 << 20, 40_000, 1 << 20, 7 << 20, 0];
        let all: Vec<_> = sizes.iter().enumerate().map(|(number, bytes)| slot(number as u128 + 1, *bytes)).collect();
        let (frames, too_large) = whole_set(all.clone(), vec!["vol_1".to_owned()]);
        assert_eq!(too_large, Vec::<String>::new());
        let sent: Vec<_> = frames.iter().flat_map(slots_of).cloned().collect();
        assert_eq!(sent, all);
        let (last, parts) = frames.split_last().unwrap();
        assert!(
            matches!(last, Frame::Full(set) if set.removed_volumes == ["vol_1"]),
            "the set is closed by its last frame"
        );
        assert!(parts.len() > 5 && parts.iter().all(|part| matches!(part, Frame::DesiredPart(_))));
        for frame in frames {
            assert!(v1::Down { frame: Some(frame) }.encoded_len() <= FRAME_BYTES_MAX);
        }
    }

    #[test]
    fn a_small_set_is_one_frame_and_an_empty_one_as_well() {
        assert_eq!(whole_set((1..50).map(|number| slot(number, 100)).collect(), Vec::new()).0.len(), 1);
        assert_eq!(whole_set(Vec::new(), Vec::new()).0.len(), 1);
    }

    #[test]
    fn what_fits_no_frame_is_mentioned_alone() {
        let (frames, too_large) = whole_set(vec![slot(1, 9 << 20), slot(2, 10)], Vec::new());
        assert_eq!(too_large, [SlotId::from_u128(1).to_string()]);
        let slots = slots_of(&frames[0]);
        assert_eq!((slots.len(), &slots[0].spec, slots[0].present), (2, &None, true));
    }
}
