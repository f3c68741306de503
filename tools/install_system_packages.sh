#!/bin/bash
# Install what some tests need and pip cannot bring: a Slurm to start on this machine, mpirun, and a browser.
#
#   tools/install_system_packages.sh
#
# Debian and Ubuntu only (apt), as root or through sudo without a password. Installs what is missing and nothing else,
# so running it again costs nothing. Where it cannot install it says so and ends with 0: those tests then skip, and say
# why. Ends with another code only if apt itself fails.

set -u

# Which package brings which command. The tests start daemons of their own and use no system service
# (tests/slurm/lab.py); Debian starts the installed Slurm's only once there is an /etc/slurm/slurm.conf.
packages=(slurmctld slurmd slurm-client munge openmpi-bin chromium chromium-driver)
commands=(slurmctld slurmd srun munged mpirun chromium chromedriver)

say() {
    echo "install_system_packages: $*"
}

PATH=$PATH:/usr/sbin:/sbin # where Debian keeps daemons, and users' shells do not look
missing=()
for index in "${!packages[@]}"; do
    if command -v "${commands[index]}" >/dev/null; then
        say "${packages[index]}: here already (${commands[index]})"
    else
        missing+=("${packages[index]}")
    fi
done
if [ ${#missing[@]} -eq 0 ]; then
    say "nothing to do"
    exit 0
fi

if ! command -v apt-get >/dev/null; then
    say "no apt on this system, so not installed: ${missing[*]}. Tests that need them will skip."
    exit 0
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        say "neither root nor sudo without a password, so not installed: ${missing[*]}. Tests that need them will skip."
        say "to install them: sudo $0"
        exit 0
    fi
    as_root=(sudo -n)
fi

# The list of packages may be absent or too old on a fresh machine: refreshed only when installing without that fails.
install_missing() {
    ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
}
say "installing: ${missing[*]}"
if ! install_missing; then
    say "refreshing the list of packages"
    if ! { ${as_root[@]+"${as_root[@]}"} apt-get update && install_missing; }; then
        say "apt could not install ${missing[*]}, see above. Tests that need them will skip." >&2
        exit 1
    fi
fi
say "installed: ${missing[*]}"
