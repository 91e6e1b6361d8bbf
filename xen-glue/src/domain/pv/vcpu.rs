//! A PV guest's virtual CPUs: registers with frames in them, and state that passes as it is.
#![forbid(unsafe_code)]

use mover::units::usize_of;
use zerocopy::{FromBytes, IntoBytes};

use super::frames::GuestFrames;
use super::tables::frame_of;
use super::{set_word, word};
use crate::abi::{ExtVcpuContext, VcpuContext, VcpuMsr};
use crate::domain::DomainError;
use crate::domain::common::{Domain, LOG};
use crate::stream::{VcpuKind, VcpuState};

/// Bit 0 of the second control register: there is a user page table.
const HAS_USER_TABLE: u64 = 1;

/// Offset of control register `at`.
fn control(at: usize) -> usize {
    VcpuContext::CONTROL + at * 8
}

/// Replaces every frame in a virtual CPU's registers by what `translate` makes of it; it is told what the frame is
/// for, and which level of page table it has to be, 0 for none.
pub(super) fn translate<E>(
    context: &mut [u8],
    first: bool,
    mut translate: impl FnMut(u64, &str, u8) -> Result<u64, E>,
    bad: impl Fn(String) -> E,
) -> Result<(), E> {
    if first {
        let frame = word(context, VcpuContext::RDX);
        set_word(context, VcpuContext::RDX, translate(frame, "start info", 0)?);
    }
    let entries = word(context, VcpuContext::GDT_ENTRIES);
    if entries > VcpuContext::GDT_ENTRIES_MAX {
        return Err(bad(format!("a virtual CPU has {entries} descriptors")));
    }
    for at in 0..usize_of(entries.div_ceil(VcpuContext::GDT_ENTRIES_A_PAGE)) {
        let place = VcpuContext::GDT_FRAMES + at * 8;
        let frame = word(context, place);
        set_word(context, place, translate(frame, "descriptors", 0)?);
    }
    let kernel = frame_of(word(context, control(3)));
    set_word(context, control(3), translate(kernel, "page table", 4)? << 12);
    let user = word(context, control(1));
    if user & !HAS_USER_TABLE != 0 {
        let frame = translate(frame_of(user), "user page table", 4)?;
        set_word(context, control(1), frame << 12 | HAS_USER_TABLE);
    }
    Ok(())
}

/// Reads the state of every virtual CPU that is plugged in.
pub(super) fn read_all(domain: &mut Domain, frames: &GuestFrames) -> Result<Vec<VcpuState>, DomainError> {
    let id = domain.id;
    let fail = || DomainError::call("read a virtual CPU", id, LOG);
    let mut states = Vec::new();
    for vcpu in 0..=domain.info.max_vcpu_id {
        if domain.xen.vcpu_info(id, vcpu).map_err(fail())?.online == 0 {
            continue;
        }
        let mut add = |kind, context: Vec<u8>| {
            if !context.is_empty() {
                states.push(VcpuState { kind, vcpu, context });
            }
        };
        let mut buffer = domain.xen.buffer(VcpuContext::BYTES).map_err(fail())?;
        domain.xen.vcpu_context(id, vcpu, &mut buffer).map_err(fail())?;
        let mut context = buffer.as_bytes().to_vec();
        let bad = |what: String| DomainError::Guest { domain: id, what };
        let to_guest = |frame, what: &str, _| {
            frames
                .guest_frame(frame)
                .ok_or_else(|| bad(format!("frame {frame:#x} of virtual CPU {vcpu} ({what}) is not its own")))
        };
        translate(&mut context, vcpu == 0, to_guest, bad)?;
        add(VcpuKind::Basic, context);

        let extended = domain.xen.ext_vcpu_context(id, vcpu).map_err(fail())?;
        let bytes = usize_of(extended.size.into()).min(size_of::<ExtVcpuContext>());
        add(VcpuKind::Extended, extended.as_bytes()[..bytes].to_vec());

        let bytes = domain.xen.ext_state_bytes(id, vcpu).map_err(fail())?;
        if bytes > 0 {
            let mut buffer = domain.xen.buffer(bytes).map_err(fail())?;
            let bytes = domain.xen.ext_state(id, vcpu, &mut buffer).map_err(fail())?;
            add(VcpuKind::Xsave, buffer.as_bytes()[..bytes].to_vec());
        }

        let most = domain.xen.vcpu_msrs_max(id, vcpu).map_err(fail())?;
        if most > 0 {
            let mut buffer = domain.xen.buffer(most * size_of::<VcpuMsr>()).map_err(fail())?;
            let count = domain.xen.vcpu_msrs(id, vcpu, &mut buffer).map_err(fail())?;
            add(
                VcpuKind::Msrs,
                buffer.as_bytes()[..(count * size_of::<VcpuMsr>()).min(buffer.len())].to_vec(),
            );
        }
    }
    Ok(states)
}

/// Gives the domain one part of a virtual CPU's state, frames translated.
pub(super) fn write(domain: &mut Domain, state: &VcpuState, context: &[u8]) -> Result<(), DomainError> {
    let remedy =
        "This host's CPU may lack what the guest uses; `xl dmesg` here says what the hypervisor objects to";
    let (id, vcpu) = (domain.id, state.vcpu);
    let fail = || DomainError::call("set a virtual CPU", id, remedy);
    let buffer = domain.filled(context).map_err(fail())?;
    match state.kind {
        VcpuKind::Basic => domain.xen.set_vcpu_context(id, vcpu, &buffer),
        VcpuKind::Xsave => domain.xen.set_ext_state(id, vcpu, &buffer),
        VcpuKind::Msrs => domain.xen.set_vcpu_msrs(id, vcpu, &buffer),
        VcpuKind::Extended => {
            let mut whole = [0; size_of::<ExtVcpuContext>()];
            let bytes = context.len().min(whole.len());
            whole[..bytes].copy_from_slice(&context[..bytes]);
            let mut extended = ExtVcpuContext::read_from_bytes(&whole).unwrap_or_default();
            extended.vcpu = vcpu;
            domain.xen.set_ext_vcpu_context(id, &extended)
        }
    }
    .map_err(fail())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_is_translated_and_nothing_else_changes() {
        let mut context = vec![0; VcpuContext::BYTES];
        set_word(&mut context, VcpuContext::RDX, 5);
        set_word(&mut context, VcpuContext::GDT_ENTRIES, 513);
        set_word(&mut context, VcpuContext::GDT_FRAMES, 6);
        set_word(&mut context, VcpuContext::GDT_FRAMES + 8, 7);
        set_word(&mut context, VcpuContext::GDT_FRAMES + 16, 99);
        set_word(&mut context, control(3), 8 << 12);
        set_word(&mut context, control(1), 9 << 12 | 1);
        set_word(&mut context, control(4), 0x20);
        let mut told = Vec::new();
        let ten_more = |frame: u64, what: &str, level: u8| {
            told.push((frame, what.to_string(), level));
            Ok::<_, String>(frame + 10)
        };
        translate(&mut context, true, ten_more, |what| what).unwrap();
        let expected = [
            (VcpuContext::RDX, 15),
            (VcpuContext::GDT_FRAMES, 16),
            (VcpuContext::GDT_FRAMES + 8, 17),
            (VcpuContext::GDT_FRAMES + 16, 99),
            (control(3), 18 << 12),
            (control(1), 19 << 12 | 1),
            (control(4), 0x20),
        ];
        for (at, value) in expected {
            assert_eq!(word(&context, at), value, "at {at}");
        }
        assert_eq!(told.iter().filter(|(_, _, level)| *level == 4).count(), 2);
        set_word(&mut context, VcpuContext::GDT_ENTRIES, 7169);
        assert!(translate(&mut context, false, |f, _, _| Ok(f), |what: String| what).is_err());
    }
}
