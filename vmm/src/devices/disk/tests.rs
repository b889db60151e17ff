use super::*;

fn check(flag: &str) -> Result<DiskSpec, String> {
    let disk = DiskConfig::from_flag(flag).map_err(|e| e.to_string())?;
    disk.check(3).map_err(|e| e.to_string())
}

#[test]
fn flags_and_json_say_the_same() {
    let flag = DiskConfig::from_flag(
        "path=/d,ro,direct,queues=4,threads=2,id=root,serial=S1,bw=10M,bw-burst=20M,iops=100,\
         iops-burst=7,engine=io_uring,block-size=4K,physical-block-size=8192,lock=off",
    )
    .unwrap();
    let json: DiskConfig = serde_json::from_str(
        r#"{"path":"/d","readonly":true,"direct":true,"queues":4,"threads":2,"id":"root",
            "serial":"S1","bw":"10M","bw_burst":"20M","iops":100,"iops_burst":7,
            "engine":"io_uring","block_size":4096,"physical_block_size":8192,"lock":false}"#,
    )
    .unwrap();
    assert_eq!(flag, json);
    let short = DiskConfig::from_flag("fd=7,cache=writethrough").unwrap();
    let json = r#"{"path":"fd:7","cache":"writethrough"}"#;
    assert_eq!(short, serde_json::from_str(json).unwrap());
}

#[test]
fn what_is_left_out_has_a_sensible_value() {
    let spec = check("path=/d").unwrap();
    assert_eq!(spec.id(), "disk3");
    let options = &spec.options;
    assert_eq!(options.serial, "disk3");
    assert!(options.lock && options.writeback && !options.readonly && !options.direct);
    assert_eq!((options.queues, options.threads), (1, 1));
    assert_eq!(options.limits, Limits::default());
    let limited = check("path=/d,bw=1M,iops=5,iops-burst=9").unwrap();
    let limit = |rate, burst| RateLimit::new(rate, burst);
    assert_eq!(limited.options.limits.bytes, limit(1 << 20, 1 << 20));
    assert_eq!(limited.options.limits.ops, limit(5, 9));
    let long = check("path=/d,id=a-name-that-is-longer-than-a-serial").unwrap();
    assert_eq!(long.options.serial, "a-name-that-is-longe");
}

#[test]
fn threads_are_told_apart_in_fifteen_bytes() {
    let names = |flag: &str| {
        let spec = check(flag).unwrap();
        let all = 0..spec.options.threads;
        all.map(|n| spec.thread_name(n)).collect::<Vec<_>>()
    };
    assert_eq!(names("path=/d,id=root"), ["blk-root"]);
    let many = names("path=/d,id=abcdefghijkl,queues=64,threads=64");
    assert_eq!(many[63], "blk-abcdefgh-63");
    assert!(many.iter().all(|name| name.len() <= 15));
}

#[test]
fn wrong_values_are_named() {
    for (flag, says) in [
        ("ro", "`ro`: name the disk's file: path=FILE"),
        ("/d", "`/d` in `/d` is not known here; known are path"),
        (
            "path=/d,size=1G",
            "`size` in `path=/d,size=1G` is not known",
        ),
        ("path=/d,path=/e", "one disk has one file"),
        ("path=/d,fd=7", "one disk has one file"),
        ("fd=1", "greater than 2"),
        ("fd", "a value is missing"),
        ("path=/d,ro=yes", "write on or off"),
        ("path=/d,queues=0", "disk3: a disk has 1 to 64 queues"),
        ("path=/d,queues=65", "a disk has 1 to 64 queues"),
        ("path=/d,queues=-1", "`queues=-1`"),
        ("path=/d,threads=2", "2 threads cannot share 1 queues"),
        ("path=/d,threads=0", "0 threads"),
        ("path=/d,engine=aio", "write auto, io_uring or sync"),
        ("path=/d,cache=none", "write writeback or writethrough"),
        ("path=/d,ro,cache=writethrough", "cache has no effect"),
        ("path=/d,block-size=513", "a block of 513 bytes cannot be"),
        ("path=/d,block-size=256", "write 512, 1024, 2048 or 4096"),
        ("path=/d,block-size=8K", "a block of 8192 bytes"),
        ("path=/d,block-size=4G", "too large for a block"),
        ("path=/d,physical-block-size=100", "a power of two"),
        (
            "path=/d,block-size=4K,physical-block-size=512",
            "is smaller than",
        ),
        ("path=/d,serial=123456789012345678901", "up to 20"),
        ("path=/d,serial=with space", "up to 20"),
        ("path=/d,bw=0", "a limit of 0 would stop the disk"),
        ("path=/d,iops=0", "a limit of 0 would stop the disk"),
        ("path=/d,iops=5,iops-burst=0", "a limit of 0"),
        ("path=/d,bw-burst=5", "bw_burst has no effect without bw"),
        (
            "path=/d,iops-burst=5",
            "iops_burst has no effect without iops",
        ),
        ("path=/d,bw=much", "`much` is not a size"),
    ] {
        let error = check(flag).unwrap_err();
        assert!(error.contains(says), "{flag}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn a_disk_of_nothing_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let open = |path: &Path| {
        let flag = format!("path={}", path.display());
        let error = check(&flag).unwrap().disk().map(|_| ()).unwrap_err();
        format!("{:#}", anyhow::Error::from(error))
    };
    assert!(open(&missing).starts_with(&format!("cannot open disk {}: ", missing.display())));
    let folder = open(dir.path());
    assert_eq!(
        folder,
        format!(
            "disk {}: is a directory; a disk is a regular file or a block device",
            dir.path().display()
        )
    );
    assert!(open(Path::new("/dev/zero")).contains("is a character device"));
    let empty = dir.path().join("empty");
    File::create(&empty).unwrap();
    assert!(open(&empty).contains("truncate -s"));
}
