use super::vhd::made;
use super::*;
use proptest::prelude::*;

/// A qcow2 header as QEMU writes it: what it is made of can be changed one by one.
struct Made {
    version: u32,
    name: Vec<u8>,
    extensions: Vec<(u32, Vec<u8>)>,
    incompatible: u64,
    autoclear: u64,
    cluster_bits: u32,
    header: u32,
}

impl Made {
    fn over(name: &str) -> Self {
        let format = (0xe279_2aca, b"raw".to_vec());
        Self {
            version: 3,
            name: name.into(),
            extensions: vec![(0x6803_f857, vec![7; 13]), format],
            incompatible: 0,
            autoclear: 0,
            cluster_bits: 16,
            header: 104,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize_of(u64::from(self.header)).max(104)];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"QFI\xfb");
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(72, &self.incompatible.to_be_bytes());
        put(88, &self.autoclear.to_be_bytes());
        put(100, &self.header.to_be_bytes());
        for (kind, value) in &self.extensions {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        if !self.name.is_empty() {
            let at = u64::try_from(bytes.len()).unwrap();
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(self.name.len()).unwrap().to_be_bytes());
            bytes.extend(&self.name);
        }
        bytes.resize(1 << 17, 0);
        bytes
    }

    fn layer(&self) -> Result<Layer, Refusal> {
        layer(&self.bytes()[..], Format::Qcow2, None)
    }
}

fn raw(name: &str) -> Layer {
    Layer::Over(Backing { name: name.to_owned(), format: Format::Raw, uuid: None })
}

fn refusal(layer: Result<Layer, Refusal>) -> String {
    layer.expect_err("it was taken").0
}

#[test]
fn a_qcow2_says_what_is_under_it() {
    assert_eq!(Made::over("golden.raw").layer(), Ok(raw("golden.raw")));
    let mut old = Made { version: 2, header: 0, ..Made::over("/images/a b") };
    // Version 2 has no length of its own, and extensions begin behind its 72 bytes: where version 3 has feature bits.
    old.extensions.clear();
    assert!(refusal(old.layer()).contains("does not say the format"));
    let alone = Made { name: Vec::new(), ..Made::over("") };
    assert_eq!(alone.layer(), Ok(Layer::Clusters));
    let mut beside = Made { incompatible: 4, autoclear: 2, name: Vec::new(), ..Made::over("") };
    assert!(refusal(beside.layer()).contains("does not name the file"));
    beside.extensions.push((0x4441_5441, b"desk.data".to_vec()));
    assert_eq!(beside.layer(), Ok(Layer::RawIn("desk.data".to_owned())));
    beside.autoclear = 0;
    assert_eq!(beside.layer(), Ok(Layer::Clusters), "there it stands in clusters");
}

#[test]
fn a_qcow2_that_can_not_be_followed_is_refused() {
    let with = |change: &dyn Fn(&mut Made)| {
        let mut made = Made::over("golden.raw");
        change(&mut made);
        refusal(made.layer())
    };
    assert!(with(&|made| made.version = 4).contains("version is 4"));
    assert!(with(&|made| made.incompatible = 1 << 5).contains("not known (0x20)"));
    for bits in [0, 8, 22, u32::MAX] {
        assert!(with(&|made| made.cluster_bits = bits).contains("sizes are wrong"));
    }
    assert!(with(&|made| made.extensions[1].1 = b"vmdk".to_vec()).contains("`vmdk`"));
    assert!(with(&|made| drop(made.extensions.pop())).contains("does not say the format"));
    assert!(with(&|made| made.extensions.push((0xe279_2aca, b"qcow2".to_vec()))).contains("twice"));
    let many = |made: &mut Made| made.extensions = vec![(1, Vec::new()); 65];
    assert!(with(&many).contains("more than 64"));
    for name in ["nbd://host/golden", "json:{\"driver\":\"raw\"}", "file:golden.raw"] {
        assert!(with(&|made| made.name = name.into()).contains("is no path"), "{name}");
    }
    assert!(with(&|made| made.name = b"a\nb".to_vec()).contains("`ab`, has characters"));
    assert!(with(&|made| made.name = vec![0xff; 4]).contains("is no text"));
    assert!(with(&|made| made.name = vec![b'a'; 1024]).contains("not where one can be"));
    assert_eq!(Made::over(&"a".repeat(1023)).layer(), Ok(raw(&"a".repeat(1023))));
    // Beyond the first cluster, before the header's end, at the end of all numbers.
    for offset in [70_000_u64, 65_536, 50, u64::MAX - 3] {
        let mut bytes = Made::over("golden.raw").bytes();
        bytes[8..16].copy_from_slice(&offset.to_be_bytes());
        let why = refusal(layer(&bytes[..], Format::Qcow2, None));
        assert!(why.contains("not where one can be"), "{offset}: {why}");
    }
    for length in [0, 3, 4, 71, 72, 100, 103] {
        let bytes = &Made::over("golden.raw").bytes()[..length];
        let why = refusal(layer(bytes, Format::Qcow2, None));
        assert!(why.contains("cut off") || why.contains("no qcow2"), "{length}: {why}");
    }
    let mut bytes = Made::over("golden.raw").bytes();
    bytes[108..112].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(refusal(layer(&bytes[..], Format::Qcow2, None)).contains("longer than the header"));
    bytes[100..104].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(refusal(layer(&bytes[..], Format::Qcow2, None)).contains("sizes are wrong"));
}

#[test]
fn a_vhd_says_what_is_under_it() {
    let of = |image: &[u8]| layer(image, Format::Vhd, None);
    assert_eq!(of(&[vec![7; 4096], made::footer(2, [1; 16])].concat()), Ok(Layer::Raw));
    let dynamic = made::footer(3, [1; 16]);
    assert_eq!(of(&[dynamic.clone(), vec![0; 4096]].concat()), Ok(Layer::Clusters), "the copy will do");
    let url = (b"MacX", b"file:///sr/golden.raw".to_vec());
    let relative = (b"W2ru", made::utf16(".\\golden.raw"));
    let absolute = (b"W2ku", made::utf16("/sr/golden.raw"));
    let drive = (b"W2ku", made::utf16("C:\\golden.raw"));
    let over = |locators: &[(&[u8; 4], Vec<u8>)]| of(&made::clone([0; 16], locators));
    assert_eq!(over(&[relative.clone(), url]), Ok(raw("/sr/golden.raw")));
    assert_eq!(over(&[drive.clone(), relative]), Ok(raw("./golden.raw")));
    assert_eq!(over(&[drive.clone(), absolute]), Ok(raw("/sr/golden.raw")));
    assert!(refusal(over(&[drive])).contains("is no path"));
    assert!(refusal(over(&[])).contains("does not say where"));
    assert!(refusal(over(&[(b"W2ru", vec![0x00, 0xd8])])).contains("is no text"));
    let parent = made::clone([9; 16], &[(b"MacX", b"file://parent.vhd".to_vec())]);
    let backing = Backing { name: "parent.vhd".to_owned(), format: Format::Vhd, uuid: Some([9; 16]) };
    assert_eq!(of(&parent), Ok(Layer::Over(backing)));
}

#[test]
fn a_vhd_that_can_not_be_followed_is_refused() {
    let whole = made::clone([0; 16], &[(b"MacX", b"file:///golden.raw".to_vec())]);
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        refusal(layer(&bytes[..], Format::Vhd, None))
    };
    for length in [0, 1, 511] {
        assert!(with(&|bytes| bytes.truncate(length)).contains("no VHD"));
    }
    // Neither footer is whole, or only one that a guest may have written.
    let last = whole.len() - 512;
    assert!(
        with(&|bytes| {
            bytes[90] ^= 1;
            bytes[last + 90] ^= 1;
        })
        .contains("no VHD")
    );
    let guests = [made::footer(2, [0; 16]), vec![0; 4096]].concat();
    assert!(refusal(layer(&guests[..], Format::Vhd, None)).contains("no VHD"));
    assert!(with(&|bytes| bytes[600] ^= 1).contains("header is damaged"));
    assert!(with(&|bytes| bytes[last..].copy_from_slice(&made::footer(9, [0; 16]))).contains("kind is 9"));
    let other = layer(&whole[..], Format::Vhd, Some(&[3; 16]));
    assert!(refusal(other).contains("UUID is another"));
    assert!(layer(&whole[..], Format::Vhd, Some(&[0xc1; 16])).is_ok());
}

/// The first KiB, or the last 512 bytes, of images that `qemu-img` 7.2 made. What follows in their first cluster is zero.
fn kept(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kept/clones").join(name)).unwrap()
}

/// What QEMU itself makes: a chain of three over a raw image, in both versions; over a VHD; and chains without a raw end.
#[test]
fn chains_of_qemus_own_making_are_followed_to_their_end() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir(at("clones")).unwrap();
    for name in ["two", "three", "alone", "split", "four", "over"] {
        let name = format!("{name}.qcow2");
        std::fs::write(at(&name), kept(&name)).unwrap();
    }
    std::fs::write(at("clones/one.qcow2"), kept("one.qcow2")).unwrap();
    std::fs::write(at("fixed.vhd"), [vec![1; 8 << 20], kept("fixed.vhd")].concat()).unwrap();
    std::fs::write(at("dynamic.vhd"), [vec![0; 2048], kept("dynamic.vhd")].concat()).unwrap();
    let bottom = |name: &str| {
        let format = if name.ends_with("vhd") { Format::Vhd } else { Format::Qcow2 };
        super::bottom(&at(name), format).map_err(|error| error.to_string())
    };
    let under = |path: &str| Ok(Bottom { path: at(path), written: false });
    assert_eq!(bottom("clones/one.qcow2"), under("clones/../golden.raw"));
    assert_eq!(bottom("two.qcow2"), under("clones/../golden.raw"), "version 2");
    assert_eq!(bottom("three.qcow2"), under("clones/../golden.raw"));
    assert_eq!(bottom("four.qcow2"), under("fixed.vhd"));
    let own = |path: &str| Ok(Bottom { path: at(path), written: true });
    assert_eq!(bottom("split.qcow2"), own("desk.data"));
    assert_eq!(bottom("fixed.vhd"), own("fixed.vhd"));
    assert_eq!(super::bottom(&at("any"), Format::Raw).map_err(|error| error.to_string()), own("any"));
    for (name, last) in [("over.qcow2", "alone.qcow2"), ("dynamic.vhd", "dynamic.vhd")] {
        let error = bottom(name).unwrap_err();
        assert!(error.contains(&format!("{last}: there is no raw image under it")), "{error}");
    }
}

#[test]
fn chains_without_an_end_and_names_of_nothing_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut itself = Made::over("itself");
    itself.extensions = vec![(0xe279_2aca, b"qcow2".to_vec())];
    std::fs::write(at("itself"), itself.bytes()).unwrap();
    let error = bottom(&at("itself"), Format::Qcow2).unwrap_err().to_string();
    assert!(error.contains("under 16 others, or under itself"), "{error}");
    let error = bottom(&at("none"), Format::Qcow2).unwrap_err().to_string();
    assert!(error.contains("reading the header of") && error.contains("none"), "{error}");
    for device in ["/dev/null", directory.path().to_str().unwrap()] {
        let error = bottom(device.as_ref(), Format::Qcow2).unwrap_err().to_string();
        assert!(error.contains("neither a file nor a block device"), "{error}");
    }
    // A chain of VHDs, whose parent has been replaced.
    let clone = made::clone([9; 16], &[(b"MacX", b"file://parent.vhd".to_vec())]);
    std::fs::write(at("clone.vhd"), clone).unwrap();
    std::fs::write(at("parent.vhd"), [vec![1; 4096], made::footer(2, [9; 16])].concat()).unwrap();
    let base = bottom(&at("clone.vhd"), Format::Vhd).unwrap();
    assert_eq!(base, Bottom { path: at("parent.vhd"), written: false });
    std::fs::write(at("parent.vhd"), [vec![1; 4096], made::footer(2, [8; 16])].concat()).unwrap();
    let error = bottom(&at("clone.vhd"), Format::Vhd).unwrap_err().to_string();
    assert!(error.contains("parent.vhd: it is not the image that the clone was made of"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Whatever changes in a header, it is refused or names a path within the limits.
    #[test]
    fn any_changed_header_is_refused_or_names_a_path(
        qcow2 in any::<bool>(),
        changes in prop::collection::vec((0_usize..1600, any::<u8>()), 1..6),
    ) {
        let (mut bytes, format) = if qcow2 {
            (Made::over("golden.raw").bytes(), Format::Qcow2)
        } else {
            (made::clone([0; 16], &[(b"MacX", b"file:///golden.raw".to_vec())]), Format::Vhd)
        };
        for (at, value) in changes {
            let at = if qcow2 { at % 220 } else { at };
            bytes[at] = value;
        }
        if let Ok(Layer::Over(Backing { name, .. }) | Layer::RawIn(name)) = layer(&bytes[..], format, None) {
            prop_assert!(!name.is_empty() && name.len() <= IMAGE_NAME_BYTES_MAX);
            prop_assert!(!name.chars().any(char::is_control));
        }
    }
}
