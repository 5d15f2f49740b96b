use std::path::Path;

use super::*;

const DOMAIN: &str = r#"<domain type='kvm' id='3'>
  <name>web01</name>
  <os><type>hvm</type><nvram template='/t'>/var/lib/web01.nvram</nvram></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/i/a&amp;b.qcow2' index='2'>
      <privateData/></source><backingStore/><target dev='vda' bus='virtio'/></disk>
    <disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sda'/></disk>
    <disk type='file' device='cdrom'><target dev='hdc'/><readonly/></disk>
    <disk type='network'><driver type='raw'/><source protocol='rbd' name='p/i'/><target dev='vdb'/><shareable/></disk>
    <disk type='file'><source/><target dev='vdc'/></disk>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
  <seclabel type='dynamic' model='apparmor'><label>libvirt-x</label></seclabel>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+106</label></seclabel>
</domain>"#;

#[test]
fn a_domain_is_read() {
    let domain = read_domain("web01", DOMAIN).unwrap();
    assert_eq!(domain.nvram.as_deref(), Some(Path::new("/var/lib/web01.nvram")));
    assert_eq!(domain.owner, Some((64055, 106)));
    assert!(domain.has_agent);
    let targets: Vec<&str> = domain.disks.iter().map(|disk| disk.target.as_str()).collect();
    assert_eq!(targets, ["vda", "sda", "hdc", "vdb", "vdc"]);
    let [vda, sda, hdc, vdb, vdc] = &domain.disks[..] else { panic!("five disks") };
    assert_eq!(vda.path.as_deref(), Some(Path::new("/i/a&b.qcow2")));
    assert_eq!((vda.format.as_str(), &vda.device, vda.has_source), ("qcow2", &Device::Disk, true));
    assert_eq!(sda.device, Device::Other("lun".into()));
    assert_eq!(sda.path.as_deref(), Some(Path::new("/dev/sdx")));
    assert!(hdc.read_only && !hdc.has_source);
    assert!(vdb.shareable && vdb.has_source && vdb.path.is_none());
    assert_eq!(vdb.kind, "network");
    assert!(!vdc.has_source, "an empty source element is no source");
    assert_eq!(vdc.format, "raw");
}

#[test]
fn hostile_xml_is_refused() {
    let bomb = "<!DOCTYPE domain [<!ENTITY a 'aaaa'>]><domain><name>&a;</name></domain>";
    assert!(read_domain("x", bomb).is_err(), "document types");
    assert!(read_domain("x", "<domainbackup/>").is_err(), "another root");
    assert!(read_domain("x", "<domain>").is_err(), "an open element");
    assert!(read_domain("x", &" ".repeat(MAX_BYTES + 1)).is_err(), "too long");
    let many = format!("<domain>{}</domain>", "<a/>".repeat(MAX_NODES as usize + 1));
    assert!(read_domain("x", &many).is_err(), "too many elements");
    let deep = 200_000;
    let text = format!("<domain>{}{}</domain>", "<a>".repeat(deep), "</a>".repeat(deep));
    // accepted or refused, but the stack holds
    let _ = read_domain("x", &text);
}

#[test]
fn what_is_written_is_read_again() {
    let socket = "/var/tmp/it's <a> \"b\" & c/nbd";
    let disks = [
        JobDisk { target: "vda", since: Some("vmkeep-1-a"), scratch: "/s/vda" },
        JobDisk { target: "vdb", since: None, scratch: "/s/vdb" },
    ];
    let text = write_backup(socket, &disks, &["hdc"]);
    assert_eq!(read_backup_socket("x", &text).unwrap(), Some(PathBuf::from(socket)));
    let document = Document::parse(&text).unwrap();
    let modes: Vec<_> = document
        .descendants()
        .filter(|node| node.has_tag_name("disk"))
        .map(|disk| {
            ["name", "backup", "backupmode", "incremental", "exportbitmap"].map(|a| disk.attribute(a))
        })
        .collect();
    assert_eq!(
        modes,
        [
            [Some("vda"), Some("yes"), Some("incremental"), Some("vmkeep-1-a"), Some("backup-vda")],
            [Some("vdb"), Some("yes"), Some("full"), None, None],
            [Some("hdc"), Some("no"), None, None, None],
        ]
    );

    let text = write_checkpoint("c&1", &["vda"], &["vdb"]);
    assert!(!text.contains("creationTime") && text.contains("'vdb' checkpoint='no'"), "{text}");
    let text = write_redefined("c&1", &["vda"], Some("c&0"), 7);
    let tracked = read_checkpoint("c&1", &text).unwrap();
    assert_eq!(tracked, [CheckpointDisk { target: "vda".into(), dirty_bytes: None }]);
    assert!(
        text.contains("<name>c&amp;1</name><parent><name>c&amp;0</name></parent><creationTime>7<"),
        "{text}"
    );
    assert!(text.contains("bitmap='c&amp;1'"), "{text}");
}

#[test]
fn what_xml_cannot_say_becomes_a_replacement() {
    let mut xml = Writer::default();
    xml.text("a", "\u{1}\n\u{ffff}x");
    assert_eq!(xml.finish(), "<a>\u{fffd}&#10;\u{fffd}x</a>");
}

#[test]
fn sizes_of_checkpoints_are_read() {
    let text = "<domaincheckpoint><name>c</name><disks><disk name='vda' checkpoint='bitmap' bitmap='c' \
                size='131072'/><disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>";
    let disks = read_checkpoint("c", text).unwrap();
    assert_eq!(disks, [CheckpointDisk { target: "vda".into(), dirty_bytes: Some(131_072) }]);
}

#[test]
fn a_job_without_a_socket_has_none() {
    assert_eq!(read_backup_socket("x", "<domainbackup mode='push'/>").unwrap(), None);
}

#[test]
fn any_text_is_read_or_refused() {
    let test = concat!(module_path!(), "::alone_xml");
    crate::mutate::finish_alone(crate::mutate::start_alone(test, &[]));
}

#[test]
#[ignore = "measures its own process: run by any_text_is_read_or_refused"]
fn alone_xml() {
    let samples = [
        DOMAIN.as_bytes().to_vec(),
        write_backup("/s", &[], &["vda"]).into_bytes(),
        write_checkpoint("c", &["vda"], &["vdb"]).into_bytes(),
        write_redefined("c", &["vda"], Some("b"), 7).into_bytes(),
    ];
    crate::mutate::fuzz("XML of libvirt", &samples, true, 8.0, &mut |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let _ = read_domain("web01", &text);
        let _ = read_backup_socket("web01", &text);
        let _ = read_origin("web01", &text);
        let _ = read_checkpoint("web01", &text);
    });
}
