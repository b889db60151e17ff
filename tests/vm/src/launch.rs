//! Starting `testudo-vmm`: its arguments, what its standard streams are, who it runs as.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use testudo_lab::cpio::Cpio;

use crate::capture::Capture;
use crate::context::{Ctx, Kernel};
use crate::outcome::Verdict;
use crate::running::{Finished, Running};

/// For whoever only wants to know how a start ends.
const DEFAULT_LIMIT: Duration = Duration::from_secs(120);
/// `nobody`, on every Linux.
const NOBODY: u32 = 65534;
/// An ordinary user, and its group.
pub(crate) const USER: u32 = 1000;
/// Enough for a userland's programs and what they write, which stays in memory.
const SCRIPT_MEMORY: &str = "512M";

/// A start in preparation.
pub struct Launch<'a> {
    ctx: &'a Ctx,
    program: PathBuf,
    args: Vec<OsString>,
    guest: Option<Guest>,
    control: Option<PathBuf>,
    read_after: Duration,
    user: Option<u32>,
    terminal: Option<File>,
    /// Open until the child has them.
    inherited: Vec<OwnedFd>,
}

/// What `run` is told about the guest, unless a test says it in its own way.
struct Guest {
    kernel: OsString,
    initrd: Option<OsString>,
    cmdline: String,
    /// For bash in the Debian userland.
    script: Option<String>,
    /// Names and contents of what the script finds in `/run/files`.
    files: Vec<(String, Vec<u8>)>,
}

impl Guest {
    /// Makes what a script needs: its disk, memory to work with, and an initramfs that holds it. The
    /// kernel unpacks archives one after the other.
    fn bring_script(&mut self, ctx: &Ctx, args: &mut Vec<OsString>) -> Verdict {
        let (Some(script), Some(initrd)) = (&self.script, &mut self.initrd) else {
            return Ok(());
        };
        let mut disk = OsString::from("path=");
        disk.push(&ctx.images.userland);
        disk.push(",ro");
        let mut first = vec![OsString::from("--disk"), disk];
        if !args.iter().any(|a| a == "--memory") {
            first.extend(["--memory", SCRIPT_MEMORY].map(OsString::from));
        }
        // Behind `run`, before the test's own disks.
        args.splice(1..1, first);
        let mut cpio = Cpio::new(std::fs::read(&initrd)?);
        cpio.file("script", 0o755, script.as_bytes())?;
        if !self.files.is_empty() {
            cpio.dir("files")?;
        }
        for (name, data) in &self.files {
            cpio.file(&format!("files/{name}"), 0o755, data)?;
        }
        let path = ctx.new_path("initramfs");
        std::fs::write(&path, cpio.finish()?)?;
        *initrd = path.into();
        Ok(())
    }
}

impl<'a> Launch<'a> {
    pub(crate) fn bare(ctx: &'a Ctx) -> Launch<'a> {
        Launch {
            ctx,
            program: ctx.images.vmm.clone(),
            args: Vec::new(),
            guest: None,
            control: None,
            read_after: Duration::ZERO,
            user: None,
            terminal: None,
            inherited: Vec::new(),
        }
    }

    pub(crate) fn guest(ctx: &'a Ctx, orders: &str) -> Launch<'a> {
        let mut launch = Launch::bare(ctx).arg("run");
        launch.guest = Some(Guest {
            kernel: ctx.kernel(Kernel::OwnBzimage).into(),
            initrd: Some(ctx.images.initramfs_bare.clone().into()),
            cmdline: format!("console=ttyS0 quiet panic=-1 testudo.do={orders}"),
            script: None,
            files: Vec::new(),
        });
        launch
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args
            .extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Boots another kernel. Debian's gets its modules loaded before the orders.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        if let Some(guest) = &mut self.guest {
            guest.kernel = self.ctx.kernel(kernel).into();
            if kernel.is_stock() {
                guest.initrd = Some(self.ctx.images.initramfs.clone().into());
                guest.cmdline = guest
                    .cmdline
                    .replacen("testudo.do=", "testudo.do=modules,", 1);
            }
        }
        self
    }

    /// Adds words to the kernel command line.
    pub fn cmdline(mut self, more: &str) -> Self {
        if let Some(guest) = &mut self.guest {
            guest.cmdline = format!("{more} {}", guest.cmdline);
        }
        self
    }

    /// The guest's console is this device instead of the serial port.
    pub fn console(mut self, device: &str) -> Self {
        if let Some(guest) = &mut self.guest {
            let console = format!("console={device}");
            guest.cmdline = guest.cmdline.replace("console=ttyS0", &console);
        }
        self
    }

    /// Hands the kernel, or another file, over as a descriptor; returns its `fd:N`.
    pub fn pass(&mut self, file: &File) -> Verdict<String> {
        // The copy is not close-on-exec, unlike what std opens.
        let copy = rustix::io::dup(file)?;
        let name = format!("fd:{}", copy.as_raw_fd());
        self.inherited.push(copy);
        Ok(name)
    }

    /// Boots this kernel file, or `fd:N`.
    pub fn kernel_source(mut self, source: impl Into<OsString>) -> Self {
        if let Some(guest) = &mut self.guest {
            guest.kernel = source.into();
        }
        self
    }

    /// With this initramfs file, or `fd:N`.
    pub fn initrd_source(mut self, source: impl Into<OsString>) -> Self {
        if let Some(guest) = &mut self.guest {
            guest.initrd = Some(source.into());
        }
        self
    }

    /// Gives the guest the Debian userland for its first disk, and this for the init's order `script`.
    pub fn script(mut self, script: &str) -> Self {
        if let Some(guest) = &mut self.guest {
            guest.script = Some(script.to_owned());
        }
        self
    }

    /// A file that the script finds as `/run/files/NAME`, executable.
    pub fn script_file(mut self, name: &str, data: &[u8]) -> Self {
        if let Some(guest) = &mut self.guest {
            guest.files.push((name.to_owned(), data.to_owned()));
        }
        self
    }

    /// With a control socket in the test's folder.
    pub fn control(self) -> Self {
        let path = self.ctx.path("control");
        self.control_at(&path)
    }

    /// With a control socket at this path.
    pub fn control_at(mut self, path: &Path) -> Self {
        self.control = Some(path.to_owned());
        self
    }

    /// Nobody reads the VMM's output for so long.
    pub fn read_after(mut self, delay: Duration) -> Self {
        self.read_after = delay;
        self
    }

    /// Runs as the user nobody. Its files have to be where nobody may read.
    pub fn as_nobody(mut self) -> Self {
        self.user = Some(NOBODY);
        self
    }

    /// Runs as an ordinary user, who may use `/dev/kvm` and is nobody else's friend. Kernel, initramfs
    /// and userland are handed over, for their folders may be closed to it; what it makes belongs
    /// into [`Ctx::home`], where its control socket is.
    pub fn as_user(mut self) -> Verdict<Self> {
        self.user = Some(USER);
        let home = self.ctx.home()?;
        std::os::unix::fs::chown("/dev/kvm", None, Some(USER))?;
        std::fs::set_permissions("/dev/kvm", Permissions::from_mode(0o660))?;
        let program = home.join("testudo-vmm");
        if !program.exists() {
            std::fs::copy(&self.program, &program)?;
        }
        self.program = program;
        Ok(self.control_at(&home.join("control")))
    }

    /// Opens what the user may have no way to.
    fn hand_over(&mut self) -> Verdict {
        let Some(guest) = &self.guest else {
            return Ok(());
        };
        let (kernel, initrd) = (guest.kernel.clone(), guest.initrd.clone());
        let kernel = self.pass(&File::open(&kernel)?)?;
        let initrd = match initrd {
            Some(path) => Some(self.pass(&File::open(&path)?)?.into()),
            None => None,
        };
        if let Some(guest) = &mut self.guest {
            guest.kernel = kernel.into();
            guest.initrd = initrd;
        }
        let userland = self.ctx.images.userland.clone();
        let mut disk = OsString::from("path=");
        disk.push(&userland);
        disk.push(",ro");
        if let Some(place) = self.args.iter().position(|arg| *arg == disk) {
            let fd = self.pass(&File::open(&userland)?)?;
            let disk = format!("fd={},ro", fd.trim_start_matches("fd:"));
            if let Some(argument) = self.args.get_mut(place) {
                *argument = disk.into();
            }
        }
        Ok(())
    }

    /// Another copy of the VMM.
    pub fn program(mut self, path: &Path) -> Self {
        self.program = path.to_owned();
        self
    }

    /// Standard input and output are this terminal, and it controls the process. What is written to
    /// it is not captured.
    pub fn on_terminal(mut self, terminal: File) -> Self {
        self.terminal = Some(terminal);
        self
    }

    /// Starts it.
    pub fn spawn(mut self) -> Verdict<Running<'a>> {
        let mut command = match &self.terminal {
            None => Command::new(&self.program),
            // As in a shell: the terminal is the process's own, and it is in its foreground.
            Some(_) => {
                let mut command = Command::new("setsid");
                command.arg("--ctty").arg(&self.program);
                command
            }
        };
        if let Some(guest) = &mut self.guest {
            guest.bring_script(self.ctx, &mut self.args)?;
        }
        if self.user == Some(USER) {
            self.hand_over()?;
        }
        command.args(&self.args);
        if let Some(guest) = &self.guest {
            command.arg("--kernel").arg(&guest.kernel);
            if let Some(initrd) = &guest.initrd {
                command.arg("--initrd").arg(initrd);
            }
            command.arg("--cmdline").arg(&guest.cmdline);
        }
        if let Some(path) = &self.control {
            command.arg("--control").arg(path);
        }
        match self.terminal.take() {
            Some(terminal) => {
                command.stdin(terminal.try_clone()?);
                command.stdout(terminal);
            }
            None => {
                command.stdin(Stdio::piped()).stdout(Stdio::piped());
            }
        }
        command.stderr(Stdio::piped());
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        let child = self.ctx.spawn(&mut command)?;
        drop(command);
        self.inherited.clear();
        let (stdin, stdout, stderr) = {
            let mut child = crate::context::lock(&child);
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        };
        let capture = |label: &str, from: Option<Capture>| {
            let capture = from.unwrap_or_else(Capture::empty);
            self.ctx.keep_output(label, &capture);
            capture
        };
        let stdout = stdout.map(|from| Capture::start(from, self.read_after));
        let stderr = stderr.map(|from| Capture::start(from, Duration::ZERO));
        Ok(Running {
            ctx: self.ctx,
            child,
            stdin,
            stdout: capture("console", stdout),
            stderr: capture("stderr", stderr),
            control: self.control,
            started: std::time::Instant::now(),
        })
    }

    /// Starts it and waits for its end.
    pub fn run(self) -> Verdict<Finished> {
        self.spawn()?.finish(DEFAULT_LIMIT)
    }
}
