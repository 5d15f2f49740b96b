//! Settings: flag before environment before profile before default; and `config show`, which prints the result.

use std::ffi::OsString;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::{Deserialize, Serialize};
use vmkeep::error::{Error, Result};

use super::exit::Exit;
use super::output::Table;
use super::{App, Global};

/// Name of the profile that is read where none is named.
const DEFAULT_PROFILE: &str = "default";
/// Where the system's profiles are.
const SYSTEM_DIR: &str = "/etc/vmkeep";
/// Longest profile that is read, bytes.
const MAX_PROFILE_LEN: u64 = 1 << 20;

/// Where a setting comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Flag(&'static str),
    Environment(&'static str),
    Profile(PathBuf),
    Default,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flag(name) | Self::Environment(name) => f.write_str(name),
            Self::Profile(path) => write!(f, "{}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A profile as its file has it. The keys are named like the flags.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Profile {
    pub repository: Option<String>,
    pub connect: Option<String>,
    pub cache_dir: Option<PathBuf>,
    pub progress_fps: Option<f64>,
    #[serde(default)]
    pub backup: BackupProfile,
    #[serde(default)]
    pub restore: RestoreProfile,
}

/// Defaults of `backup`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BackupProfile {
    pub level: Option<String>,
    pub include: Option<Vec<String>>,
    pub exclude: Option<Vec<String>>,
    pub freeze: Option<String>,
    pub pause: Option<bool>,
    pub scratch_dir: Option<PathBuf>,
    pub tag: Option<Vec<String>>,
    pub limit_read: Option<String>,
    pub jobs: Option<NonZeroU16>,
    pub strict: Option<bool>,
}

/// Defaults of `restore`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RestoreProfile {
    pub format: Option<String>,
}

/// The merged settings.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the profile, and the files that it was read from.
    pub profile: String,
    pub files: Vec<PathBuf>,
    pub repository: Option<(String, Origin)>,
    pub connect: Option<(String, Origin)>,
    /// Where the local index lives; `None`: in memory.
    pub cache_dir: Option<(PathBuf, Origin)>,
    pub progress_fps: Option<(f64, Origin)>,
    pub backup: BackupProfile,
    pub restore: RestoreProfile,
}

/// The process's environment, or a test's.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Settings {
    /// Merges flags, environment and profile.
    ///
    /// # Errors
    /// [`Error::Usage`] for values that make no sense and for a profile that is not there or cannot be read.
    pub fn resolve(global: &Global, environment: Lookup<'_>, system_dir: &Path) -> Result<Self> {
        let name = global.profile.as_deref().unwrap_or(DEFAULT_PROFILE);
        let mut layers = Vec::new();
        for dir in profile_dirs(environment, system_dir) {
            layers.extend(read_profile(&dir, name)?);
        }
        if layers.is_empty() && global.profile.is_some() {
            let dirs: Vec<_> = profile_dirs(environment, system_dir);
            let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
            return Err(Error::Usage(format!("there is no profile {name}.toml in {}", dirs.join(" or "))));
        }
        // the user's own profile comes last and is asked first
        layers.reverse();
        Ok(Self {
            profile: name.to_owned(),
            repository: repository(global, environment, &layers)?,
            connect: connect(global, environment, &layers)?,
            cache_dir: cache_dir(environment, &layers),
            progress_fps: progress_fps(environment, &layers)?,
            backup: merge_backup(&layers),
            restore: RestoreProfile {
                format: layers.iter().find_map(|(_, layer)| layer.restore.format.clone()),
            },
            files: layers.into_iter().map(|(path, _)| path).collect(),
        })
    }

    /// As [`Settings::resolve`] for this process.
    ///
    /// # Errors
    /// As there.
    pub fn of_process(global: &Global) -> Result<Self> {
        Self::resolve(global, &|name| std::env::var_os(name), Path::new(SYSTEM_DIR))
    }

    /// Returns the repository's URL.
    ///
    /// # Errors
    /// [`Error::Usage`] if none is named anywhere.
    pub fn repository(&self) -> Result<&str> {
        self.repository.as_ref().map(|(url, _)| url.as_str()).ok_or_else(|| {
            Error::Usage(
                "no repository is named: give -r REPO, VMKEEP_REPOSITORY, or `repository` in a profile"
                    .into(),
            )
        })
    }
}

type Layers = [(PathBuf, Profile)];

fn find<T: Clone>(layers: &Layers, of: impl Fn(&Profile) -> &Option<T>) -> Option<(T, Origin)> {
    layers.iter().find_map(|(path, layer)| {
        of(layer).as_ref().map(|value| (value.clone(), Origin::Profile(path.clone())))
    })
}

/// Returns a variable that is set to something.
fn variable(environment: Lookup<'_>, name: &str) -> Option<OsString> {
    environment(name).filter(|value| !value.is_empty())
}

fn text_variable(environment: Lookup<'_>, name: &str) -> Result<Option<String>> {
    let text = variable(environment, name).map(|value| value.into_string()).transpose();
    text.map_err(|_| Error::Usage(format!("{name} is not valid UTF-8")))
}

fn profile_dirs(environment: Lookup<'_>, system_dir: &Path) -> Vec<PathBuf> {
    let user = variable(environment, "XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| variable(environment, "HOME").map(|home| PathBuf::from(home).join(".config")));
    let user = user.map(|dir| dir.join("vmkeep"));
    [Some(system_dir.to_path_buf()), user].into_iter().flatten().collect()
}

fn read_profile(dir: &Path, name: &str) -> Result<Option<(PathBuf, Profile)>> {
    if name.contains('/') || name.starts_with('.') {
        return Err(Error::Usage(format!("{name:?} is no name of a profile, it names a file NAME.toml")));
    }
    let path = dir.join(format!("{name}.toml"));
    let too_long =
        |len: u64| Error::Usage(format!("{} has {len} bytes, too many for a profile", path.display()));
    match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", path.display(), error)),
        Ok(data) if data.len() > MAX_PROFILE_LEN => return Err(too_long(data.len())),
        Ok(_) => {}
    }
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io("read", path.display(), error))?;
    match toml::from_str(&text) {
        Ok(profile) => Ok(Some((path, profile))),
        Err(error) => Err(Error::Usage(format!("{}: {}", path.display(), error.to_string().trim_end()))),
    }
}

fn repository(global: &Global, environment: Lookup<'_>, layers: &Layers) -> Result<Option<(String, Origin)>> {
    const NAME: &str = "VMKEEP_REPOSITORY";
    const FILE: &str = "VMKEEP_REPOSITORY_FILE";
    if let Some(url) = &global.repository {
        return Ok(Some((url.clone(), Origin::Flag("-r"))));
    }
    match (text_variable(environment, NAME)?, variable(environment, FILE)) {
        (Some(_), Some(_)) => Err(Error::Usage(format!("both {NAME} and {FILE} are set, set one of them"))),
        (Some(url), None) => Ok(Some((url, Origin::Environment(NAME)))),
        (None, Some(path)) => {
            let path = PathBuf::from(path);
            let text =
                std::fs::read_to_string(&path).map_err(|error| Error::io("read", path.display(), error))?;
            match text.lines().next().map(str::trim).filter(|line| !line.is_empty()) {
                Some(url) => Ok(Some((url.to_owned(), Origin::Environment(FILE)))),
                None => Err(Error::Usage(format!("{}, named by {FILE}, has no first line", path.display()))),
            }
        }
        (None, None) => Ok(find(layers, |layer| &layer.repository)),
    }
}

fn connect(global: &Global, environment: Lookup<'_>, layers: &Layers) -> Result<Option<(String, Origin)>> {
    const NAME: &str = "LIBVIRT_DEFAULT_URI";
    if let Some(uri) = &global.connect {
        return Ok(Some((uri.clone(), Origin::Flag("-c"))));
    }
    Ok(text_variable(environment, NAME)?
        .map(|uri| (uri, Origin::Environment(NAME)))
        .or_else(|| find(layers, |layer| &layer.connect)))
}

fn cache_dir(environment: Lookup<'_>, layers: &Layers) -> Option<(PathBuf, Origin)> {
    const NAME: &str = "VMKEEP_CACHE_DIR";
    if let Some(dir) = variable(environment, NAME) {
        return Some((dir.into(), Origin::Environment(NAME)));
    }
    if let Some(found) = find(layers, |layer| &layer.cache_dir) {
        return Some(found);
    }
    let default = variable(environment, "XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| variable(environment, "HOME").map(|home| PathBuf::from(home).join(".cache")));
    match default {
        Some(dir) => Some((dir.join("vmkeep"), Origin::Default)),
        // a service of root often has no HOME
        None if rustix::process::geteuid().is_root() => Some(("/var/cache/vmkeep".into(), Origin::Default)),
        None => None,
    }
}

fn progress_fps(environment: Lookup<'_>, layers: &Layers) -> Result<Option<(f64, Origin)>> {
    const NAME: &str = "VMKEEP_PROGRESS_FPS";
    let found = match text_variable(environment, NAME)? {
        Some(text) => {
            let fps = text.trim().parse::<f64>();
            let fps = fps.map_err(|_| Error::Usage(format!("{NAME} is {text:?}, expected a number")))?;
            Some((fps, Origin::Environment(NAME)))
        }
        None => find(layers, |layer| &layer.progress_fps),
    };
    match found {
        Some((fps, origin)) if !(fps > 0.0 && fps <= 60.0) => {
            Err(Error::Usage(format!("{fps} frames a second ({origin}) is not between 0 and 60")))
        }
        found => Ok(found),
    }
}

fn merge_backup(layers: &Layers) -> BackupProfile {
    let layers = || layers.iter().map(|(_, layer)| &layer.backup);
    BackupProfile {
        level: layers().find_map(|layer| layer.level.clone()),
        include: layers().find_map(|layer| layer.include.clone()),
        exclude: layers().find_map(|layer| layer.exclude.clone()),
        freeze: layers().find_map(|layer| layer.freeze.clone()),
        pause: layers().find_map(|layer| layer.pause),
        scratch_dir: layers().find_map(|layer| layer.scratch_dir.clone()),
        tag: layers().find_map(|layer| layer.tag.clone()),
        limit_read: layers().find_map(|layer| layer.limit_read.clone()),
        jobs: layers().find_map(|layer| layer.jobs),
        strict: layers().find_map(|layer| layer.strict),
    }
}

/// What can be done with the settings.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the settings as they apply, and where each comes from
    #[command(after_long_help = "Examples:
  vmkeep config show
  vmkeep -P offsite config show --json")]
    Show,
}

/// One setting.
#[derive(Debug, Serialize)]
struct SettingView {
    key: &'static str,
    value: serde_json::Value,
    origin: String,
}

#[derive(Debug, Serialize)]
struct SettingsView<'a> {
    profile: &'a str,
    files: &'a [PathBuf],
    settings: Vec<SettingView>,
}

/// Runs the command.
///
/// # Errors
/// [`Error::Io`] if stdout cannot be written.
pub fn run(command: &Command, app: &App) -> Result<Exit> {
    let Command::Show = command;
    let settings = views(&app.settings);
    if app.output.json {
        let Settings { profile, files, .. } = &app.settings;
        app.output.json_line(&SettingsView { profile, files, settings })?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["SETTING", "VALUE", "FROM"]);
    for setting in &settings {
        let value = match &setting.value {
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Null => "-".to_owned(),
            other => other.to_string(),
        };
        table.row([setting.key, &value, &setting.origin]);
    }
    app.output.bytes(table.render().as_bytes())?;
    Ok(Exit::Done)
}

fn views(settings: &Settings) -> Vec<SettingView> {
    fn view<T: Serialize>(key: &'static str, found: Option<&(T, Origin)>) -> SettingView {
        SettingView {
            key,
            // the types here are text, numbers and paths; a path that is not UTF-8 is shown as absent
            value: found.and_then(|(value, _)| serde_json::to_value(value).ok()).unwrap_or_default(),
            origin: found.map_or_else(|| "not set".to_owned(), |(_, origin)| origin.to_string()),
        }
    }
    let mut views = vec![
        view("repository", settings.repository.as_ref()),
        view("connect", settings.connect.as_ref()),
        view("cache-dir", settings.cache_dir.as_ref()),
        view("progress-fps", settings.progress_fps.as_ref()),
    ];
    let origin = format!("profile {}", settings.profile);
    let backup = &settings.backup;
    let sections: [(&'static str, serde_json::Result<serde_json::Value>); 11] = [
        ("backup.level", serde_json::to_value(&backup.level)),
        ("backup.include", serde_json::to_value(&backup.include)),
        ("backup.exclude", serde_json::to_value(&backup.exclude)),
        ("backup.freeze", serde_json::to_value(&backup.freeze)),
        ("backup.pause", serde_json::to_value(backup.pause)),
        ("backup.scratch-dir", serde_json::to_value(&backup.scratch_dir)),
        ("backup.tag", serde_json::to_value(&backup.tag)),
        ("backup.limit-read", serde_json::to_value(&backup.limit_read)),
        ("backup.jobs", serde_json::to_value(backup.jobs)),
        ("backup.strict", serde_json::to_value(backup.strict)),
        ("restore.format", serde_json::to_value(&settings.restore.format)),
    ];
    for (key, value) in sections {
        match value {
            Ok(value) if !value.is_null() => views.push(SettingView { key, value, origin: origin.clone() }),
            _ => {}
        }
    }
    views
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    struct World {
        dir: tempfile::TempDir,
        variables: HashMap<String, OsString>,
    }

    impl World {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let home = dir.path().join("home");
            for sub in ["etc", "home/.config/vmkeep"] {
                std::fs::create_dir_all(dir.path().join(sub)).unwrap();
            }
            Self { dir, variables: HashMap::from([("HOME".to_owned(), home.into())]) }
        }

        fn write(&self, path: &str, text: &str) {
            std::fs::write(self.dir.path().join(path), text).unwrap();
        }

        fn set(&mut self, name: &str, value: &str) {
            self.variables.insert(name.into(), value.into());
        }

        fn resolve(&self, global: &Global) -> Result<Settings> {
            let lookup = |name: &str| self.variables.get(name).cloned();
            Settings::resolve(global, &lookup, &self.dir.path().join("etc"))
        }
    }

    fn url(settings: &Settings) -> &str {
        settings.repository().unwrap()
    }

    #[test]
    fn a_flag_beats_the_environment_beats_the_profiles() {
        let mut world = World::new();
        let mut global = Global::default();
        assert!(world.resolve(&global).unwrap().repository().is_err());
        world.write("etc/default.toml", "repository = '/system'\n[backup]\nlevel = 'diff'\ntag = ['a']\n");
        assert_eq!(url(&world.resolve(&global).unwrap()), "/system");
        world.write("home/.config/vmkeep/default.toml", "repository = '/user'\n[backup]\ntag = ['b']\n");
        let settings = world.resolve(&global).unwrap();
        assert_eq!(url(&settings), "/user");
        assert_eq!(settings.backup.level.as_deref(), Some("diff"));
        assert_eq!(settings.backup.tag, Some(vec!["b".to_owned()]));
        world.set("VMKEEP_REPOSITORY", "/variable");
        assert_eq!(url(&world.resolve(&global).unwrap()), "/variable");
        global.repository = Some("/flag".into());
        assert_eq!(url(&world.resolve(&global).unwrap()), "/flag");
    }

    #[test]
    fn a_repository_can_be_named_in_a_file() {
        let mut world = World::new();
        world.write("url", "s3:https://host/bucket\n");
        let path = world.dir.path().join("url");
        world.set("VMKEEP_REPOSITORY_FILE", path.to_str().unwrap());
        assert_eq!(url(&world.resolve(&Global::default()).unwrap()), "s3:https://host/bucket");
        world.set("VMKEEP_REPOSITORY", "/x");
        assert!(matches!(world.resolve(&Global::default()), Err(Error::Usage(_))));
    }

    #[test]
    fn mistakes_in_profiles_are_told() {
        let world = World::new();
        let profile = |name: &str| Global { profile: Some(name.into()), ..Global::default() };
        let error = |name: &str| world.resolve(&profile(name)).unwrap_err().to_string();
        assert!(error("offsite").starts_with("there is no profile offsite.toml in "));
        assert!(error("../x").contains("no name of a profile"));
        world.write("etc/offsite.toml", "repositry = '/x'\n");
        assert!(error("offsite").contains("unknown field `repositry`"), "{}", error("offsite"));
        world.write("etc/offsite.toml", "progress-fps = 0\n");
        assert!(world.resolve(&profile("offsite")).is_err());
    }

    #[test]
    fn the_cache_follows_the_variables() {
        let mut world = World::new();
        let cache = |world: &World| world.resolve(&Global::default()).unwrap().cache_dir.unwrap().0;
        assert!(cache(&world).ends_with("home/.cache/vmkeep"));
        world.set("XDG_CACHE_HOME", "/xdg");
        assert_eq!(cache(&world), Path::new("/xdg/vmkeep"));
        world.set("VMKEEP_CACHE_DIR", "/own");
        assert_eq!(cache(&world), Path::new("/own"));
    }
}
