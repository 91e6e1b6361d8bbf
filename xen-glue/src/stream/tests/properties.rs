//! Whatever the writer lets be written is read back as it was.

use std::io::{IoSlice, IoSliceMut};

use mover::units::Pfn;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::super::*;
use super::samples::contents;

/// A record to be written.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    Cpuid(Vec<u8>),
    Msr(Vec<u8>),
    Width(PvWidth),
    Static,
    P2m(P2mFrames),
    Pages(Vec<PageEntry>),
    Verify,
    Tsc(TscInfo),
    Shared,
    Vcpu(VcpuKind, u32, Vec<u8>),
    Context(Vec<u8>),
    Params(Vec<HvmParam>),
    Optional(u32, Vec<u8>),
    Lanes(Lanes),
    LanesDone(LanesDone),
}

fn page_type(pv: bool) -> impl Strategy<Value = PageType> {
    let tables = (1..=4u8, any::<bool>()).prop_map(|(level, pinned)| PageType::Table { level, pinned });
    let plain = prop_oneof![
        6 => Just(PageType::Normal),
        1 => Just(PageType::Broken),
        1 => Just(PageType::AllocateOnly),
        1 => Just(PageType::Invalid)
    ];
    if pv { prop_oneof![plain, tables].boxed() } else { plain.boxed() }
}

fn pages(pv: bool) -> impl Strategy<Value = Step> {
    let frames = btree_map(0..limits::PFN_END, page_type(pv), 1..12);
    let in_order = frames.prop_map(|frames| {
        frames.into_iter().map(|(pfn, page_type)| PageEntry::new(Pfn(pfn), page_type)).collect::<Vec<_>>()
    });
    in_order.prop_shuffle().prop_map(Step::Pages)
}

fn optional() -> impl Strategy<Value = Step> {
    (any::<u32>(), vec(any::<u8>(), 0..40)).prop_map(|(number, body)| Step::Optional(number | OPTIONAL, body))
}

fn tsc() -> impl Strategy<Value = Step> {
    (any::<u32>(), any::<u32>(), any::<u64>(), any::<u32>())
        .prop_map(|(mode, khz, nsec, incarnation)| Step::Tsc(TscInfo { mode, khz, nsec, incarnation }))
}

fn units(bytes: usize, most: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 1..=most).prop_map(move |seed| {
        seed.iter().flat_map(|&byte| std::iter::repeat_n(byte, bytes)).collect::<Vec<u8>>()
    })
}

fn statics() -> impl Strategy<Value = Vec<Step>> {
    (proptest::option::of(units(24, 9)), proptest::option::of(units(16, 9)), vec(optional(), 0..2)).prop_map(
        |(cpuid, msr, mut steps)| {
            steps.extend(cpuid.map(Step::Cpuid));
            steps.extend(msr.map(Step::Msr));
            steps
        },
    )
}

/// How an HVM guest's memory ends.
#[derive(Clone, Debug)]
enum Last {
    InBand(Option<Step>),
    OnLanes(Lanes, LanesDone),
}

fn lanes() -> impl Strategy<Value = Lanes> {
    (any::<[u8; 16]>(), vec((1..1000u64, 1..1000u64), 0..9)).prop_map(|(migration, lengths)| {
        let mut at = 0;
        let populated: Vec<_> = lengths
            .into_iter()
            .map(|(hole, pages)| {
                let first = at + hole;
                at = first + pages;
                first..at
            })
            .collect();
        Lanes { migration, pages: at + 1, populated }
    })
}

fn lanes_done() -> impl Strategy<Value = LanesDone> {
    (any::<u64>(), any::<u64>(), any::<u32>(), any::<[u8; 32]>())
        .prop_map(|(frames, version, round, digest)| LanesDone { frames, version, round, digest })
}

fn hvm() -> impl Strategy<Value = Vec<Step>> {
    let param = (any::<u64>(), any::<u64>()).prop_map(|(index, value)| HvmParam { index, value });
    let behind = (vec(any::<u8>(), 1..99), vec(param, 0..9), tsc(), any::<bool>()).prop_map(
        |(context, params, tsc, turned)| {
            let mut steps = vec![Step::Params(params), Step::Context(context), tsc];
            if turned {
                steps.swap(0, 1);
            }
            steps
        },
    );
    let memory = vec(prop_oneof![4 => pages(false).boxed(), 1 => optional().boxed()], 0..6);
    let last = prop_oneof![
        2 => proptest::option::of(pages(false)).prop_map(Last::InBand),
        1 => (lanes(), lanes_done()).prop_map(|(lanes, done)| Last::OnLanes(lanes, done))
    ];
    (statics(), pages(false), memory, last, behind).prop_map(|(mut steps, first, memory, last, behind)| {
        steps.push(Step::Static);
        steps.push(first);
        steps.extend(memory);
        match last {
            Last::InBand(verified) => {
                steps.extend(verified.into_iter().flat_map(|pages| [Step::Verify, pages]));
            }
            Last::OnLanes(lanes, done) => steps.extend([Step::Lanes(lanes), Step::LanesDone(done)]),
        }
        steps.extend(behind);
        steps
    })
}

fn pv() -> impl Strategy<Value = Vec<Step>> {
    let width = prop_oneof![Just(PvWidth::Bits32), Just(PvWidth::Bits64)];
    let p2m = (any::<u32>(), 0..5000u32, vec(0..limits::PFN_END, 16));
    let vcpus = (1..4u32, units(1, 90), units(16, 4));
    (statics(), width, p2m, vec(pages(true), 1..5), tsc(), vcpus).prop_map(
        |(mut steps, width, (start, more, frames), memory, tsc, (vcpus, blob, msrs))| {
            let end = start.saturating_add(more);
            let count = end / width.entries_per_frame() - start / width.entries_per_frame() + 1;
            let frames = frames[..usize::try_from(count).unwrap()].to_vec();
            steps.push(Step::Width(width));
            steps.push(Step::Static);
            steps.push(Step::P2m(P2mFrames { start, end, frames }));
            steps.extend(memory);
            steps.extend([tsc, Step::Shared]);
            for vcpu in 0..vcpus {
                let basic = vec![5; usize::try_from(width.vcpu_context_bytes()).unwrap()];
                steps.push(Step::Vcpu(VcpuKind::Basic, vcpu, basic));
                steps.push(Step::Vcpu(VcpuKind::Extended, vcpu, blob.clone()));
                steps.push(Step::Vcpu(VcpuKind::Xsave, vcpu, [vec![1; 16], blob.clone()].concat()));
                steps.push(Step::Vcpu(VcpuKind::Msrs, vcpu, msrs.clone()));
            }
            steps
        },
    )
}

fn write(guest: GuestType, steps: &[Step]) -> Vec<u8> {
    let mut writer = Writer::start(Vec::new(), DomainHeader { guest, xen_major: 4, xen_minor: 19 }).unwrap();
    for step in steps {
        match step {
            Step::Cpuid(leaves) => writer.cpuid_policy(leaves),
            Step::Msr(entries) => writer.msr_policy(entries),
            Step::Width(width) => writer.pv_info(*width),
            Step::Static => writer.static_data_end(),
            Step::P2m(frames) => writer.p2m_frames(frames),
            Step::Pages(entries) => writer.page_data(entries, &[IoSlice::new(&contents(entries))]),
            Step::Verify => writer.verify(),
            Step::Tsc(tsc) => writer.tsc_info(*tsc),
            Step::Shared => writer.shared_info(&[0x5a; 4096]),
            Step::Vcpu(kind, vcpu, context) => writer.vcpu(*kind, *vcpu, context),
            Step::Context(context) => writer.hvm_context(context),
            Step::Params(params) => writer.hvm_params(params),
            Step::Optional(number, body) => writer.optional(*number, body),
            Step::Lanes(lanes) => writer.lanes(lanes),
            Step::LanesDone(done) => writer.lanes_done(done),
        }
        .unwrap_or_else(|error| panic!("{step:?}: {error}"));
    }
    writer.end().unwrap()
}

fn read(bytes: &[u8]) -> Vec<Step> {
    let mut reader = Reader::start(bytes, 0).unwrap();
    let mut steps = Vec::new();
    loop {
        steps.push(match reader.next_record().unwrap() {
            Record::CpuidPolicy(leaves) => Step::Cpuid(leaves),
            Record::MsrPolicy(entries) => Step::Msr(entries),
            Record::PvInfo(width) => Step::Width(width),
            Record::StaticDataEnd => Step::Static,
            Record::P2mFrames(frames) => Step::P2m(frames),
            Record::PageData => {
                let entries = reader.page_entries().to_vec();
                let mut found = vec![0; usize::try_from(reader.contents_left()).unwrap()];
                reader.read_pages(&mut [IoSliceMut::new(&mut found)]).unwrap();
                assert!(found == contents(&entries));
                Step::Pages(entries)
            }
            Record::Verify => Step::Verify,
            Record::TscInfo(tsc) => Step::Tsc(tsc),
            Record::SharedInfo(page) => {
                assert_eq!(*page, [0x5a; 4096]);
                Step::Shared
            }
            Record::Vcpu(state) => Step::Vcpu(state.kind, state.vcpu, state.context),
            Record::HvmContext(context) => Step::Context(context),
            Record::HvmParams(params) => Step::Params(params),
            Record::Optional { number, body } => Step::Optional(number, body.unwrap()),
            Record::Lanes(lanes) => Step::Lanes(lanes),
            Record::LanesDone(done) => Step::LanesDone(done),
            Record::FrozenDisks(_) | Record::References(_) => unreachable!("none was written"),
            Record::End => return steps,
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_hvm_stream_comes_back(steps in hvm()) {
        prop_assert_eq!(read(&write(GuestType::Hvm, &steps)), steps);
    }

    #[test]
    fn any_pv_stream_comes_back(steps in pv()) {
        prop_assert_eq!(read(&write(GuestType::Pv, &steps)), steps);
    }
}
