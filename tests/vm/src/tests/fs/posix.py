"""What POSIX says of files, checked in the current directory, as root. One function is one case;
`FACT cases=N` at the end, and a line `NOT ...` for each that does not hold."""
import ctypes, errno, fcntl, mmap, os, socket, stat, struct, sys, time, traceback

libc = ctypes.CDLL(None, use_errno=True)
here = os.getcwd()
CASES = []
USER, OTHER = 1000, 1001


def case(f):
    CASES.append(f)
    return f


def fails(number, f, *args, **kw):
    try:
        result = f(*args, **kw)
    except OSError as e:
        assert e.errno == number, f"{errno.errorcode[e.errno]} instead of {errno.errorcode[number]}"
        return
    raise AssertionError(f"done ({result!r}) instead of {errno.errorcode[number]}")


def call(f, *args):
    result = f(*args)
    if result < 0:
        n = ctypes.get_errno()
        raise OSError(n, os.strerror(n))
    return result


def renameat2(a, b, flags):
    return call(libc.syscall, 316, -100, a.encode(), -100, b.encode(), flags)


def make(name, content=b"", mode=0o644):
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    os.write(fd, content)
    os.close(fd)


def read(name):
    with open(name, "rb") as f:
        return f.read()


def as_user(f, uid=USER, groups=()):
    """Runs f as a user in a process of its own."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = b""
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            f()
        except BaseException as e:
            said = f"as {uid}: {type(e).__name__} {e}".encode()
        os.write(w, said)
        os._exit(0)
    os.close(w)
    said = os.read(r, 4000)
    os.close(r)
    os.waitpid(pid, 0)
    assert not said, said.decode()


@case
def open_errors():
    make("f")
    os.mkdir("d")
    os.symlink("f", "l")
    os.symlink("loop", "loop")
    fails(errno.ENOENT, os.open, "none", os.O_RDONLY)
    fails(errno.EEXIST, os.open, "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    fails(errno.EEXIST, os.open, "l", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    fails(errno.EISDIR, os.open, "d", os.O_WRONLY)
    fails(errno.ENOTDIR, os.open, "f/x", os.O_RDONLY)
    fails(errno.ENOTDIR, os.open, "f", os.O_RDONLY | os.O_DIRECTORY)
    fails(errno.ELOOP, os.open, "l", os.O_RDONLY | os.O_NOFOLLOW)
    fails(errno.ELOOP, os.open, "loop", os.O_RDONLY)
    fails(errno.ENAMETOOLONG, os.open, "n" * 256, os.O_CREAT | os.O_WRONLY)
    fails(errno.ENAMETOOLONG, os.stat, "x/" * 2050)


@case
def names_may_be_anything():
    for name in [b"n" * 255, b"\xff\xfe\x01", b"...", b"a b\nc", "ä".encode(), b"-rf"]:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
        assert name in os.listdir(b".")
        os.unlink(name)


@case
def mask_and_modes():
    old = os.umask(0o027)
    make("f", mode=0o666)
    os.mkdir("d", 0o777)
    os.umask(old)
    assert os.stat("f").st_mode & 0o7777 == 0o640
    assert os.stat("d").st_mode & 0o7777 == 0o750
    for mode in [0o7777, 0o1777, 0o4711, 0o2070, 0]:
        os.chmod("d", mode)
        assert os.stat("d").st_mode & 0o7777 == mode
    fails(errno.ENOENT, os.chmod, "none", 0)
    fails(errno.ENOTDIR, os.chmod, "f/x", 0)


@case
def owners():
    make("f", mode=0o6755)
    os.chown("f", USER, OTHER)
    s = os.stat("f")
    assert (s.st_uid, s.st_gid) == (USER, OTHER)
    assert s.st_mode & 0o7777 == 0o755, oct(s.st_mode)
    os.chown("f", -1, USER)
    assert os.stat("f").st_gid == USER
    os.symlink("none", "l")
    os.lchown("l", USER, USER)
    assert os.lstat("l").st_uid == USER
    os.chmod(".", 0o777)

    def user():
        fails(errno.EPERM, os.chown, "f", 0, -1)
        fails(errno.EPERM, os.chown, "f", -1, 0)
        make("mine")
        s = os.stat("mine")
        assert (s.st_uid, s.st_gid) == (USER, USER), s
        os.chmod("mine", 0o600)
        os.mkdir("dir")
        os.symlink("x", "link")
        os.mkfifo("fifo")
        for name in ["dir", "link", "fifo"]:
            assert os.lstat(name).st_uid == USER

    as_user(user)


@case
def permissions():
    make("secret", b"x", 0o600)
    make("group", b"x", 0o640)
    os.chown("group", 0, 77)
    os.mkdir("closed", 0o700)
    os.mkdir("shared")
    os.chmod("shared", 0o770)
    os.chown("shared", 0, 77)
    os.mkdir("sticky")
    os.chmod("sticky", 0o1777)
    make("sticky/root")

    def user():
        fails(errno.EACCES, os.open, "secret", os.O_RDONLY)
        fails(errno.EACCES, os.open, "group", os.O_RDONLY)
        fails(errno.EACCES, os.listdir, "closed")
        fails(errno.EACCES, os.stat, "closed/x")
        fails(errno.EACCES, os.unlink, "secret")
        fails(errno.EACCES, os.mkdir, "new")
        fails(errno.EPERM, os.chmod, "secret", 0o666)
        fails(errno.EPERM, os.unlink, "sticky/root")
        fails(errno.EPERM, os.utime, "secret", (1, 1))

    def member():
        assert read("group") == b"x"
        fails(errno.EACCES, os.open, "group", os.O_WRONLY)
        make("shared/mine")
        assert os.stat("shared/mine").st_uid == USER

    os.chmod(".", 0o755)
    as_user(user)
    as_user(member, groups=(77,))


@case
def set_group_id_of_a_directory_is_inherited():
    os.mkdir("d")
    os.chown("d", 0, 77)
    os.chmod("d", 0o2777)

    def user():
        make("d/f")
        os.mkdir("d/e")
        assert os.stat("d/f").st_gid == 77
        s = os.stat("d/e")
        assert s.st_gid == 77 and s.st_mode & 0o2000

    as_user(user)


@case
def privileges_go_with_a_write():
    make("f", b"x", 0o777)
    os.chmod("f", 0o6777)

    def user():
        fd = os.open("f", os.O_WRONLY)
        os.write(fd, b"y")
        assert os.fstat(fd).st_mode & 0o6000 == 0, oct(os.fstat(fd).st_mode)

    as_user(user)
    os.chmod("f", 0o6777)
    as_user(lambda: os.truncate("f", 0))
    assert os.stat("f").st_mode & 0o6000 == 0


@case
def unlink_errors():
    os.mkdir("d")
    make("f")
    fails(errno.ENOENT, os.unlink, "none")
    fails(errno.EISDIR, os.unlink, "d")
    fails(errno.ENOTDIR, os.unlink, "f/x")
    fails(errno.ENOTDIR, os.rmdir, "f")
    make("d/x")
    fails(errno.ENOTEMPTY, os.rmdir, "d")
    fails(errno.ENOENT, os.rmdir, "none")
    fails(errno.EEXIST, os.mkdir, "d")
    fails(errno.EEXIST, os.mkdir, "f")
    fails(errno.ENOENT, os.mkdir, "none/x")


@case
def rename_rules():
    make("a", b"a")
    make("b", b"b")
    os.mkdir("d")
    os.mkdir("e")
    make("e/x")
    ino = os.stat("a").st_ino
    os.rename("a", "b")
    assert read("b") == b"a" and os.stat("b").st_ino == ino and not os.path.exists("a")
    fails(errno.ENOENT, os.rename, "a", "c")
    fails(errno.EISDIR, os.rename, "b", "d")
    fails(errno.ENOTDIR, os.rename, "d", "b")
    fails(errno.ENOTEMPTY, os.rename, "d", "e")
    fails(errno.EINVAL, os.rename, "e", "e/sub")
    os.rename("e", "d")
    assert os.listdir("d") == ["x"]
    make("a", b"2")
    fails(errno.EEXIST, renameat2, "a", "b", 1)
    renameat2("a", "b", 2)
    assert (read("a"), read("b")) == (b"a", b"2")
    os.link("a", "same")
    os.rename("a", "same")
    assert os.path.exists("a"), "two names of one file: nothing is done"


@case
def hard_links():
    make("f", b"1")
    os.link("f", "g")
    assert os.stat("f").st_nlink == 2 and os.stat("g").st_ino == os.stat("f").st_ino
    with open("g", "ab") as g:
        g.write(b"2")
    assert read("f") == b"12"
    fails(errno.EEXIST, os.link, "f", "g")
    fails(errno.ENOENT, os.link, "none", "h")
    os.mkdir("d")
    fails(errno.EPERM, os.link, "d", "h")
    os.unlink("f")
    assert os.stat("g").st_nlink == 1
    os.symlink("none", "l")
    os.link("l", "l2", follow_symlinks=False)
    assert os.readlink("l2") == "none"


@case
def symbolic_links():
    for target in ["x", "/etc/passwd", "../../..", "t" * 4095]:
        os.symlink(target, "l")
        assert os.readlink("l") == target and os.lstat("l").st_size == len(target)
        os.unlink("l")
    make("f")
    fails(errno.EEXIST, os.symlink, "x", "f")
    fails(errno.EINVAL, os.readlink, "f")
    os.symlink("/etc/hostname", "l")
    assert read("l") == read("/etc/hostname"), "a link leads where the guest says"


@case
def times():
    make("f")
    os.utime("f", ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
    s = os.stat("f")
    assert (s.st_atime_ns, s.st_mtime_ns) == (1_234_567_890_123_456_789, 987_654_321_987_654_321)
    before = s.st_ctime_ns
    # The host's clock ticks.
    time.sleep(0.05)
    os.chmod("f", 0o600)
    assert os.stat("f").st_ctime_ns > before
    os.mkdir("d")
    os.utime("d", (1, 1))
    make("d/x")
    assert os.stat("d").st_mtime > 1_000_000
    os.utime("f", (1, 1))
    with open("f", "ab") as f:
        f.write(b"x")
    assert os.stat("f").st_mtime > 1_000_000
    os.symlink("f", "l")
    os.utime("l", (5, 6), follow_symlinks=False)
    assert os.lstat("l").st_mtime == 6 and os.stat("f").st_mtime != 6


@case
def sizes():
    make("f", b"0123456789")
    os.truncate("f", 4)
    assert read("f") == b"0123"
    os.truncate("f", 8)
    assert read("f") == b"0123\0\0\0\0"
    os.mkdir("d")
    fails(errno.EISDIR, os.truncate, "d", 0)
    fails(errno.ENOENT, os.truncate, "none", 0)
    fd = os.open("f", os.O_RDONLY)
    fails(errno.EINVAL, os.ftruncate, fd, 0)
    fails(errno.EBADF, os.write, fd, b"x")
    os.close(fd)
    os.close(os.open("f", os.O_WRONLY | os.O_TRUNC))
    assert os.stat("f").st_size == 0


@case
def sparse_files():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x", 10 << 20)
    os.fsync(fd)
    assert os.stat("f").st_blocks * 512 < 1 << 20
    assert os.lseek(fd, 0, os.SEEK_DATA) == 10 << 20
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
    assert os.pread(fd, 10, 5 << 20) == bytes(10)
    os.posix_fallocate(fd, 0, 1 << 20)
    assert os.stat("f").st_blocks * 512 >= 1 << 20
    call(libc.fallocate, fd, 3, ctypes.c_long(0), ctypes.c_long(1 << 20))
    assert os.stat("f").st_size == (10 << 20) + 1
    os.close(fd)


@case
def what_is_open_stays():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"kept")
    os.unlink("f")
    assert os.fstat(fd).st_nlink == 0 and os.pread(fd, 10, 0) == b"kept"
    os.pwrite(fd, b"more", 4)
    assert os.pread(fd, 10, 0) == b"keptmore"
    os.ftruncate(fd, 2)
    assert os.fstat(fd).st_size == 2
    os.fchmod(fd, 0o600)
    os.close(fd)
    make("a", b"old")
    make("b", b"new")
    fd = os.open("a", os.O_RDONLY)
    os.rename("b", "a")
    assert os.read(fd, 10) == b"old" and read("a") == b"new"
    os.close(fd)
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    os.rmdir("d")
    assert os.listdir(fd) == []
    os.close(fd)


@case
def appending():
    a = os.open("f", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    b = os.open("f", os.O_WRONLY | os.O_APPEND)
    for n in range(20):
        os.write(a, b"a")
        os.write(b, b"b")
    assert read("f") == b"ab" * 20


@case
def temporary_files():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"tmp")
    assert os.fstat(fd).st_nlink == 0 and os.listdir(".") == []
    call(libc.linkat, -100, f"/proc/self/fd/{fd}".encode(), -100, b"named", 0x400)
    assert read("named") == b"tmp"
    os.close(fd)


@case
def special_files():
    os.mkfifo("fifo", 0o600)
    pid = os.fork()
    if pid == 0:
        with open("fifo", "wb") as f:
            f.write(b"through")
        os._exit(0)
    assert read("fifo") == b"through"
    os.waitpid(pid, 0)
    s = socket.socket(socket.AF_UNIX)
    s.bind("socket")
    s.listen()
    c = socket.socket(socket.AF_UNIX)
    c.connect("socket")
    os.mknod("whiteout", stat.S_IFCHR, 0)
    assert os.stat("whiteout").st_rdev == 0
    fails(errno.EPERM, os.mknod, "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    fails(errno.EPERM, os.mknod, "disk", stat.S_IFBLK | 0o666, os.makedev(8, 0))


@case
def extended_attributes():
    make("f")
    os.setxattr("f", "user.a", b"1" * 3000)
    os.setxattr("f", "user.b", b"")
    assert os.getxattr("f", "user.a") == b"1" * 3000
    assert sorted(os.listxattr("f")) == ["user.a", "user.b"]
    fails(errno.EEXIST, os.setxattr, "f", "user.a", b"2", os.XATTR_CREATE)
    fails(errno.ENODATA, os.setxattr, "f", "user.c", b"2", os.XATTR_REPLACE)
    fails(errno.ENODATA, os.getxattr, "f", "user.c")
    os.removexattr("f", "user.a")
    assert os.listxattr("f") == ["user.b"]
    os.setxattr("f", "security.capability", struct.pack("<IIIII", 0x2000000, 1, 0, 0, 0))
    with open("f", "ab") as f:
        f.write(b"x")
    assert "security.capability" not in os.listxattr("f"), "kept by a write"


@case
def record_locks():
    make("f", b"0" * 100)
    fd = os.open("f", os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)

    def other():
        mine = os.open("f", os.O_RDWR)
        for e in [errno.EAGAIN]:
            fails(e, fcntl.lockf, mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
        fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)

    as_other_process(other)
    fcntl.lockf(fd, fcntl.LOCK_UN)
    as_other_process(lambda: fcntl.lockf(os.open("f", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB))
    os.close(fd)


def as_other_process(f):
    as_user(f, uid=0)


@case
def file_locks():
    make("f")
    fd = os.open("f", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    other = os.open("f", os.O_RDONLY)
    fails(errno.EAGAIN, fcntl.flock, other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(fd)
    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(other)


@case
def mapped_files():
    if sys.argv[1:] == ["none"]:
        # Without a cache there is nothing that could be shared; private maps work.
        make("f", b"x" * 5000)
        fd = os.open("f", os.O_RDONLY)
        m = mmap.mmap(fd, 5000, mmap.MAP_PRIVATE, mmap.PROT_READ)
        assert m[4999:] == b"x"
        return
    make("f", b"x" * 10000)
    fd = os.open("f", os.O_RDWR)
    m = mmap.mmap(fd, 10000)
    m[5000:5004] = b"mmap"
    m.flush()
    assert os.pread(fd, 4, 5000) == b"mmap"
    os.pwrite(fd, b"write", 100)
    assert m[100:105] == b"write"
    m.close()
    os.close(fd)
    assert read("f")[5000:5004] == b"mmap"


@case
def copies():
    data = os.urandom(1 << 20)
    make("a", data)
    a, b = os.open("a", os.O_RDONLY), os.open("b", os.O_RDWR | os.O_CREAT)
    assert os.copy_file_range(a, b, 1 << 20) == 1 << 20
    assert os.pread(b, 1 << 21, 0) == data
    os.sendfile(b, a, 1000, 5000)
    assert os.pread(b, 5000, 1 << 20) == data[1000:6000]


@case
def listings():
    for n in range(600):
        make(f"f{n:04}")
    assert len(os.listdir(".")) == 600
    seen = set()
    with os.scandir(".") as entries:
        for e in entries:
            assert e.is_file(follow_symlinks=False) and e.name not in seen
            seen.add(e.name)
            os.unlink(e.name)
    assert len(seen) == 600 and os.listdir(".") == []


@case
def the_file_system_itself():
    s = os.statvfs(".")
    assert s.f_blocks > 0 and s.f_bfree <= s.f_blocks and s.f_namemax >= 255
    os.sync()
    fd = os.open(".", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    call(libc.syscall, 306, os.open(".", os.O_RDONLY))


@case
def deep_paths():
    path = "/".join(["d"] * 100)
    os.makedirs(path)
    make(path + "/f", b"deep")
    assert read(path + "/f") == b"deep"
    os.rename("d/d", "moved")
    assert read("moved/" + "/".join(["d"] * 98) + "/f") == b"deep"


failed = 0
for one in CASES:
    work = os.path.join(here, one.__name__)
    os.mkdir(work)
    os.chdir(work)
    try:
        one()
    except BaseException:
        failed += 1
        where = traceback.format_exc().strip().splitlines()
        print("NOT", one.__name__, "|", " | ".join(where[-3:]))
    os.chdir(here)
    os.system(f"rm -rf {work}")
print(f"FACT cases={len(CASES)}")
print(f"FACT failed={failed}")
